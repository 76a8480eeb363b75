"""Predictions of `edgevlm plan` beside measurements on this processor, and docs/sizing.md.

    python -m benchmarks.sizing --work FOLDER [--save]        every 0.5B preset, three precisions
    python -m benchmarks.sizing --engines E1 E2 ... [--save]  engines that exist
    python -m benchmarks.sizing --page                        write docs/sizing.md again

Each engine runs on one thread, in processor time of its own process: other programs on the machine
lengthen wall time, and change this little. The peaks that a prediction starts from are measured
likewise, before and after. One image of 640 x 480 and 32 tokens of text in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Bar, Report, edgevlm, parser, workplace
from edgevlm.engines import manifest
from edgevlm.engines.backends import Peaks, probes, sessions
from edgevlm.engines.profiling.profile import ProfileRequest
from edgevlm.engines.profiling.roofline import question
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.sizing import rates
from edgevlm.engines.sizing.predict import Asked, Format, Planner
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import Prompt
from edgevlm.toolkit.vlm.config import ModelConfig

PRESETS = (
    *("llava-qwen2-0.5b", "mmfuser-0.5b", "comm-0.5b", "convllava-0.5b-768"),
    *("convllava-0.5b-1024", "convllava-0.5b-1536", "mlcd-embodied-0.5b", "mlcd-bigg-448-0.5b"),
)
PRECISIONS = ("fp32", "int8", "int4")
TOLERANCE = 0.25
RUNS, TOKENS, CONTEXT = 3, 12, 4096


# -- one engine, in a process of its own ---------------------------------------------------------


@contextmanager
def processor_time() -> Iterator[None]:
    """Let time.perf_counter, which every clock here reads, count this process's work alone."""
    wall = time.perf_counter
    time.perf_counter = time.process_time
    try:
        yield
    finally:
        time.perf_counter = wall


def peaks() -> Peaks:
    """Of one thread."""
    options = sessions.session_options(1)
    with TemporaryDirectory() as folder, processor_time():
        probes.write(Path(folder))
        return probes.measure(Path(folder), lambda path: sessions.open_session(path, options))


def stages(session: Session, number: int) -> dict[str, float]:
    """Milliseconds of the stages of one question; "decode" is the median of its tokens."""
    from edgevlm.engines.runtime.clock import Clock

    pixels = np.random.default_rng(number).integers(0, 256, (480, 640, 3), np.uint8)
    from PIL import Image

    clock, state = Clock(), session.new_state()
    features = session.encode([LoadedImage(Image.fromarray(pixels))], clock)
    ids = tuple(range(3, 3 + ProfileRequest().prompt_tokens))
    sequence = prompts.assemble(Prompt((ids[:1], ids[1:])), features.indices)
    with clock.time("prefill"):
        token = int(session.prefill(sequence, features.rows, state).argmax())
    found, steps = clock.totals_ms(), []
    found["first"] = clock.now_ms()
    for step in range(TOKENS):
        begin = clock.now_ms()
        token = int(session.decode(token, sequence.length + step, state).argmax())
        steps.append(clock.now_ms() - begin)
    return {**found, "decode": float(np.median(steps))}


def measure(folder: Path) -> dict[str, Any]:
    """Stages of an engine (the best of several runs), peaks, and what is predicted."""
    before = peaks()
    with Session.open(folder, threads=1) as session, processor_time():
        stages(session, 0)
        runs = [stages(session, number) for number in range(1, 1 + RUNS)]
    after = peaks()
    best = Peaks(
        *(max(getattr(p, n) for p in (before, after)) for n in ("gflop_s", "int8_gop_s", "gb_s"))
    )
    engine = manifest.read(folder)
    prompt_plan = engine.prompt_form.plan if engine.prompt_form else None
    model = engine.parsed_vlm()
    given = Format("", engine.dtype, engine.plan, prompt_plan)
    machine = rates.Machine(
        "cpu", engine.parsed_target(), best, 1 << 40, rates.PROCESSOR, measured=True
    )
    planner = Planner(model, Asked(engine.context, answer=TOKENS))
    predicted = {n: 1000 * t.seconds for n, t in planner.stages(given, machine).items()}
    predicted["first"] = sum(ms for name, ms in predicted.items() if name != "decode")
    measured = {name: min(run.get(name, 0.0) for run in runs) for name in runs[0]}
    return {
        "model": shown(model),
        "precision": engine.precision or "fp32",
        "prompt_tokens": question(model).prompt_tokens,
        "peaks": [round(x, 1) for x in (best.gflop_s, best.int8_gop_s, best.gb_s)],
        "measured_ms": {name: round(ms, 2) for name, ms in measured.items()},
        "predicted_ms": {name: round(ms, 2) for name, ms in predicted.items()},
    }


def shown(model: ModelConfig) -> str:
    """A model by what decides its speed."""
    encoders = ", ".join(encoder.name for encoder in model.encoders)
    return f"{model.system} ({encoders}; a decoder of {model.lm.config.num_layers} layers)"


# -- all -----------------------------------------------------------------------------------------


def engines(work: Path) -> Iterator[tuple[str, Path]]:
    """Every preset in every precision, one at a time; of random weights any loss will do."""
    for preset in PRESETS:
        bundle = work / preset
        if not bundle.exists():
            edgevlm(
                *("export", f"preset:{preset}", bundle, "--random-weights", "--dtype", "fp16"),
                *("--max-context", str(CONTEXT)),
            )
        for precision in PRECISIONS:
            out = work / f"{preset}-{precision}"
            words = () if precision == "fp32" else ("--precision", precision, "--accept-loss", "9")
            if not out.exists():
                edgevlm("build", bundle, out, *words)
            yield f"{preset} {precision}", out


def main(options: Namespace) -> bool:
    """Measure, compare, print."""
    columns = ("engine", "first token, CPU s", "predicted", "", "ms a token", "predicted", "")
    report = Report("sizing", columns, ("edgevlm", "onnxruntime", "numpy"))
    with workplace(options) as work:
        given = [(folder.name, folder) for folder in map(Path, options.engines)]
        for name, folder in given or engines(work):
            words = [sys.executable, "-m", "benchmarks.sizing", "--one", str(folder)]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            label = f"{found['model']} {found['precision']}" if given else name
            report.measured[label] = found
            ratios = add(report, label, found)
            print(label, ratios, file=sys.stderr, flush=True)
    report.notes.append("Random weights, one thread, processor time.")
    return report.finish(options)


def add(report: Report, label: str, found: dict[str, Any]) -> list[float]:
    """A row of the table and the bars of an engine; predicted over measured."""
    pairs = [(found["measured_ms"][key], found["predicted_ms"][key]) for key in ("first", "decode")]
    ratios = [predicted / measured for measured, predicted in pairs]
    cells = [(m, p, f"{r:.2f} x") for (m, p), r in zip(pairs, ratios, strict=True)]
    first = (cells[0][0] / 1000, cells[0][1] / 1000, cells[0][2])
    report.rows.append((label, *first, *cells[1]))
    for what, ratio in zip(("first token", "token"), ratios, strict=True):
        error = abs(ratio - 1)
        report.bars.append(Bar(f"{label}, {what}: error of the prediction", error, TOLERANCE))
    return ratios


if __name__ == "__main__":
    command_line = parser(__doc__)
    command_line.add_argument("--engines", nargs="*", default=[], help="engines that exist")
    command_line.add_argument("--one", type=Path, help="measure one engine; prints JSON")
    command_line.add_argument("--page", action="store_true", help="write docs/sizing.md again")
    arguments = command_line.parse_args()
    if arguments.page:
        from benchmarks.sizing_page import PAGE, page

        PAGE.write_text(page(), encoding="utf-8")
    elif arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
    else:
        sys.exit(not main(arguments))
