"""Predictions of `edgevlm plan` beside measurements on this processor, and docs/sizing.md.

    python -m benchmarks.sizing --work FOLDER [--save]        every 0.5B preset, three precisions
    python -m benchmarks.sizing --work FOLDER --minutes 20    as many of them as that allows
    python -m benchmarks.sizing --engines E1 E2 ... [--save]  engines that exist
    python -m benchmarks.sizing --page                        write docs/sizing.md again

Every run is on one thread, in processor time of its own process: other programs on the machine
lengthen wall time, and change this little. The peaks that a prediction starts from are measured
likewise, before and after. One image of 640 x 480 and 32 tokens of text in.

All presets have the same decoder, so it is measured once in every precision, behind prompts of
their lengths, and each vision side in front of a decoder of one layer (sizing_parts.py). What was
measured is kept in FOLDER/parts.jsonl, and is not measured again; predictions are those of today.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Bar, Report, parser, workplace
from benchmarks.sizing_parts import (
    PRECISIONS,
    PRESETS,
    Part,
    best,
    bundle_of,
    format_of,
    joined,
    machine_of,
    processor_time,
    repeated,
    repredicted,
    whole,
    whole_prediction,
    work_of,
)
from edgevlm.engines import manifest
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.vlm.config import ModelConfig

TOLERANCE = 0.25
COLUMNS = ("engine", "first token, CPU s", "predicted", "", "ms a token", "predicted", "")


# -- engines that exist --------------------------------------------------------------------------


def measure(folder: Path) -> dict[str, Any]:
    """Stages of an engine (the best of several runs), peaks, and what is predicted."""

    def runs() -> list[dict[str, float]]:
        with Session.open(folder, threads=1) as session, processor_time():
            return repeated(lambda number: whole(session, number))

    measured, peaks = best(runs)
    engine = manifest.read(folder)
    model = engine.parsed_vlm()
    machine = machine_of(peaks)
    predicted = whole_prediction(model, format_of(engine), machine, engine.context)
    return {
        "model": shown(model),
        "precision": engine.precision or "fp32",
        "peaks": [round(x, 1) for x in (peaks.gflop_s, peaks.int8_gop_s, peaks.gb_s)],
        "measured_ms": {name: round(ms, 2) for name, ms in measured.items()},
        "predicted_ms": {name: round(ms, 2) for name, ms in predicted.items()},
    }


def shown(model: ModelConfig) -> str:
    """A model by what decides its speed."""
    encoders = ", ".join(encoder.name for encoder in model.encoders)
    return f"{model.system} ({encoders}; a decoder of {model.lm.config.num_layers} layers)"


def of_engines(folders: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every engine, each in a process of its own."""
    for folder in folders:
        found = child("benchmarks.sizing", "--one", folder)
        yield f"{found['model']} {found['precision']}", found


def child(module: str, *words: str | Path) -> dict[str, Any]:
    """What a process of a benchmark prints."""
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- presets, in parts ---------------------------------------------------------------------------


def parts(options: Namespace) -> list[Part]:
    """The parts that are asked for, the decoder's first."""
    decoders = [Part(precision) for precision in options.precisions]
    visions = [Part(p, preset) for preset in options.presets for p in options.precisions]
    return [*decoders, *visions]


def kept(work: Path) -> dict[Part, dict[str, Any]]:
    """What was measured before."""
    file = work / "parts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = {}
    for line in map(json.loads, lines):
        words = line["part"]
        found[Part(words[-1], words[1] if words[0] == "vision" else None)] = line
    return found


def measure_parts(work: Path, options: Namespace) -> None:
    """Those that are not measured yet, until the time is over."""
    begin, wanted = time.perf_counter(), parts(options)
    for number, part in enumerate(wanted):
        if part not in kept(work) and time.perf_counter() - begin < 60 * options.minutes:
            print("sizing:", *part.words, file=sys.stderr, flush=True)
            line = child("benchmarks.sizing_parts", work, *part.words)
            with (work / "parts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if bundle_of(part, work) not in {bundle_of(later, work) for later in wanted[number + 1 :]}:
            shutil.rmtree(bundle_of(part, work), ignore_errors=True)


def of_presets(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every preset and precision of which both parts were measured."""
    lines = {part: repredicted(part, line) for part, line in kept(work).items()}
    for preset in PRESETS:
        for precision in PRECISIONS:
            vision, decoder = lines.get(Part(precision, preset)), lines.get(Part(precision))
            if vision and decoder and str(work_of(preset).prompt_tokens) in decoder["lengths"]:
                yield f"{preset} {precision}", joined(preset, vision, decoder)


# -- all -----------------------------------------------------------------------------------------


def main(options: Namespace) -> bool:
    """Measure, compare, print."""
    report = Report("sizing", COLUMNS, ("edgevlm", "onnxruntime", "numpy"))
    with workplace(options) as work:
        if options.engines:
            found = of_engines([Path(folder).resolve() for folder in options.engines])
        else:
            measure_parts(work, options)
            found = of_presets(work)
        for label, one in found:
            report.measured[label] = one
            add(report, label, one)
    report.notes.append("Random weights, one thread, processor time.")
    return report.finish(options)


def add(report: Report, label: str, found: dict[str, Any]) -> None:
    """A row of the table and the bars of an engine: predicted over measured."""
    pairs = [(found["measured_ms"][key], found["predicted_ms"][key]) for key in ("first", "decode")]
    ratios = [predicted / measured for measured, predicted in pairs]
    cells = [(m, p, f"{r:.2f} x") for (m, p), r in zip(pairs, ratios, strict=True)]
    first = (cells[0][0] / 1000, cells[0][1] / 1000, cells[0][2])
    report.rows.append((label, *first, *cells[1]))
    for what, ratio in zip(("first token", "token"), ratios, strict=True):
        error = abs(ratio - 1)
        report.bars.append(Bar(f"{label}, {what}: error of the prediction", error, TOLERANCE))


if __name__ == "__main__":
    command_line = parser(__doc__)
    command_line.add_argument("--engines", nargs="*", default=[], help="engines that exist")
    command_line.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    command_line.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    command_line.add_argument("--minutes", type=float, default=float("inf"), help="begin no more")
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
