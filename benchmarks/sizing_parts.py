"""The parts that the 0.5B presets are measured in, one process each: their vision sides, each in
front of a decoder of one layer, and the decoder that they share, at the prompt lengths of all.

    python -m benchmarks.sizing_parts WORK vision PRESET PRECISION
    python -m benchmarks.sizing_parts WORK decoder PRECISION

A part makes a bundle and an engine below WORK, measures on one thread in processor time, prints a
line of JSON and removes the engine. benchmarks.sizing keeps the lines in WORK/parts.jsonl.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np

from benchmarks.common import edgevlm
from edgevlm import api
from edgevlm.engines import manifest
from edgevlm.engines.backends import Peaks, probes, sessions
from edgevlm.engines.manifest import Engine
from edgevlm.engines.profiling.profile import ProfileRequest
from edgevlm.engines.profiling.roofline import Work, question
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.sizing import rates
from edgevlm.engines.sizing import work as working
from edgevlm.engines.sizing.predict import Asked, Format, Planner
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options, random_source
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.strict import from_plain, to_plain
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import Prompt
from edgevlm.toolkit.vlm.config import ModelConfig

Stages: TypeAlias = dict[str, float]  # milliseconds by name

PRESETS = (
    *("llava-qwen2-0.5b", "mmfuser-0.5b", "comm-0.5b", "convllava-0.5b-768"),
    *("convllava-0.5b-1024", "convllava-0.5b-1536", "mlcd-embodied-0.5b", "mlcd-bigg-448-0.5b"),
)
PRECISIONS = ("fp32", "int8", "int4")
DECODER = PRESETS[0]  # all have the same
SIZE, TEXT, TOKENS = (640, 480), ProfileRequest().prompt_tokens, 12
RUNS, ENOUGH_S = 3, 40.0  # of a part: runs after the first, fewer once they have taken so long
CONTEXT = 5120  # for the longest prompt


@dataclass(frozen=True)
class Part:
    """preset: whose vision side is measured; None for the decoder."""

    precision: str
    preset: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """As it is called."""
        what = ("decoder",) if self.preset is None else ("vision", self.preset)
        return (*what, self.precision)


def work_of(preset: str) -> Work:
    """Views and tokens of the question about an image of SIZE."""
    return question(systems.preset(preset, 0, Options()).model, SIZE, TEXT)


def lengths() -> list[int]:
    """Prompts of all presets, in tokens."""
    return sorted({work_of(preset).prompt_tokens for preset in PRESETS})


# -- time ----------------------------------------------------------------------------------------


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


def best(measured: Callable[[], list[Stages]]) -> tuple[Stages, Peaks]:
    """The shortest of every stage, and peaks measured before and after."""
    before = peaks()
    runs = measured()
    after = peaks()
    names = ("gflop_s", "int8_gop_s", "gb_s")
    found = Peaks(*(max(getattr(p, name) for p in (before, after)) for name in names))
    return {name: min(run.get(name, 0.0) for run in runs) for name in runs[0]}, found


def repeated(run: Callable[[int], Stages]) -> list[Stages]:
    """Runs after a first one that does not count."""
    begin, runs = time.perf_counter(), list[Stages]()
    run(0)
    while len(runs) < RUNS and (not runs or time.perf_counter() - begin < ENOUGH_S):
        runs.append(run(1 + len(runs)))
    return runs


# -- stages --------------------------------------------------------------------------------------


def whole(session: Session, number: int) -> Stages:
    """The stages of one question; "decode" is the shortest of its tokens, "first" all before."""
    from PIL import Image

    shape = (SIZE[1], SIZE[0], 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
    clock, state = Clock(), session.new_state()
    features = session.encode([LoadedImage(Image.fromarray(pixels))], clock)
    ids = tuple(range(3, 3 + TEXT))
    sequence = prompts.assemble(Prompt((ids[:1], ids[1:])), features.indices)
    with clock.time("prefill"):
        token = int(session.prefill(sequence, features.rows, state).argmax())
    found = clock.totals_ms()
    first = clock.now_ms()
    return {**found, "first": first, "decode": decoded(session, token, sequence.length, state)}


def decoded(session: Session, token: int, length: int, state: Any) -> float:
    """Milliseconds of a token behind `length` others: the shortest of several, as peaks are the
    best of several. Reading weights suffers most from what other programs do.
    """
    steps, clock = [], Clock()
    for step in range(TOKENS):
        begin = clock.now_ms()
        token = int(session.decode(token, length + step, state).argmax())
        steps.append(clock.now_ms() - begin)
    return min(steps)


def of_decoder(session: Session, number: int) -> Stages:
    """Prompts of every length, without an image, and tokens behind them."""
    found = Stages()
    rows = session.encode((), Clock()).rows
    for length in lengths():
        state, clock = session.new_state(), Clock()
        sequence = prompts.assemble(Prompt((tuple(range(3, 3 + length)),)), ())
        token = int(session.prefill(sequence, rows, state).argmax())
        found[f"prefill {length}"] = clock.now_ms()
        found[f"decode {length}"] = decoded(session, token, length, state)
    return found


# -- parts ---------------------------------------------------------------------------------------


def made(part: Part, work: Path) -> Path:
    """The engine of a part."""
    bundle, engine = bundle_of(part, work), work / f"engine {' '.join(part.words)}"
    source = systems.preset(part.preset or DECODER, 0, Options(max_context=CONTEXT))
    if part.preset is not None:
        config = replace(source.model.lm.config, num_layers=1)
        model = replace(source.model, lm=replace(source.model.lm, config=config))
        source = random_source(model, 0, source.tokenizer, part.preset)
    if not bundle.exists():
        where = f"preset:{part.preset or DECODER}"
        api.write_source(source, where, bundle, dtype="fp16", force=False, progress=None)
    if not engine.exists():
        words = ["--precision", part.precision, "--accept-loss", "9"]
        words = [] if part.precision == "fp32" else words
        edgevlm("build", bundle, engine, *words, *(["--no-tune"] if part.preset else []))
    return engine


def bundle_of(part: Part, work: Path) -> Path:
    """The bundle that a part shares with others."""
    return work / f"bundle {part.preset or 'decoder'}"


def measure(part: Part, work: Path) -> dict[str, Any]:
    """Make a part, measure it, and remove its engine."""
    engine = made(part, work)
    run = of_decoder if part.preset is None else whole

    def runs() -> list[Stages]:
        with Session.open(engine, threads=1) as session, processor_time():
            return repeated(lambda number: run(session, number))

    measured, found = best(runs)
    described = manifest.read(engine)
    shutil.rmtree(engine)
    form = described.prompt_form
    return {
        "part": list(part.words),
        "lengths": [] if part.preset else [str(length) for length in lengths()],
        "peaks": [round(x, 1) for x in (found.gflop_s, found.int8_gop_s, found.gb_s)],
        "measured_ms": {name: round(ms, 2) for name, ms in measured.items()},
        "dtype": described.dtype,
        "plan": to_plain(described.plan),
        "prompt_plan": to_plain(form.plan) if form else None,
    }


def repredicted(part: Part, line: Mapping[str, Any]) -> dict[str, Any]:
    """A line with what is predicted now, for the formats of its engine and its peaks."""
    prompts = line["prompt_plan"]
    plans = [from_plain(PrecisionPlan, plan, "plan") for plan in (line["plan"], prompts) if plan]
    given = Format("", line["dtype"], plans[0], plans[1] if prompts else None)
    predicted = predictions(part, given, machine_of(Peaks(*line["peaks"])))
    rounded = {name: round(ms, 2) for name, ms in predicted.items()}
    return {**line, "predicted_ms": rounded}


def format_of(engine: Engine) -> Format:
    """What an engine's weights are stored in."""
    prompt_plan = engine.prompt_form.plan if engine.prompt_form else None
    return Format("", engine.dtype, engine.plan, prompt_plan)


def machine_of(found: Peaks) -> rates.Machine:
    """This processor with peaks of one thread."""
    return rates.Machine("cpu", this_cpu(), found, 1 << 40, rates.PROCESSOR, measured=True)


def predictions(part: Part, given: Format, machine: rates.Machine) -> Stages:
    """What is predicted for the stages of a part."""
    model = systems.preset(part.preset or DECODER, 0, Options()).model
    if part.preset is not None:
        return whole_prediction(_with_layers(model, 1), given, machine, CONTEXT)
    plans = {"": given.plan} | ({"prefill": given.prompts} if given.prompts else {})
    predicted = Stages()
    for length in lengths():
        calls = working.calls(model, Work(1, 0, length), TOKENS)
        asked = [call for call in calls if call.stage in ("prefill", "decode")]
        for name, taken in working.stages(asked, plans, 4, machine).items():
            predicted[f"{name} {length}"] = 1000 * taken.seconds
    return predicted


def whole_prediction(
    model: ModelConfig, given: Format, machine: rates.Machine, context: int
) -> Stages:
    """What is predicted for the stages of a whole question."""
    planner = Planner(model, Asked(context, TEXT, TOKENS, SIZE))
    found = {n: 1000 * t.seconds for n, t in planner.stages(given, machine).items()}
    return found | {"first": sum(ms for name, ms in found.items() if name != "decode")}


def _with_layers(model: ModelConfig, layers: int) -> ModelConfig:
    return replace(model, lm=replace(model.lm, config=replace(model.lm.config, num_layers=layers)))


def joined(preset: str, vision: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's question: the stages of its vision side, then those of the whole decoder."""
    length = work_of(preset).prompt_tokens
    found: dict[str, Any] = {"prompt_tokens": length, "peaks": vision["peaks"]}
    for key in ("measured_ms", "predicted_ms"):
        left_out = ("prefill", "first", "decode")
        stages = {name: ms for name, ms in vision[key].items() if name not in left_out}
        stages["prefill"] = decoder[key][f"prefill {length}"]
        stages["first"] = round(sum(stages.values()), 2)
        found[key] = stages | {"decode": decoder[key][f"decode {length}"]}
    return found


def main(words: list[str]) -> None:
    """The command line."""
    work = Path(words[0])
    work.mkdir(parents=True, exist_ok=True)
    preset = words[2] if words[1] == "vision" else None
    print(json.dumps(measure(Part(words[-1], preset), work)))


if __name__ == "__main__":
    main(sys.argv[1:])
