"""Do small models of four systems learn, and keep what they learned through export?

A ConvLLaVA, an MMFuser, a COMM and an MLCD model (benchmarks/small_systems.py) are trained from
nothing on questions about CIFAR-10's pictures, each for the processor time that two idle
processors give in --seconds. Held-out questions are answered greedily by torch, by the engine in
float32, which has to say the same to every question, and by the engine with weights in 8 bits.

--data: a folder with train.npz and test.npz, see benchmarks/questions.py; without it nothing is
measured. --work keeps pictures, models and figures: what is there is not trained again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks import greedy, questions, small_systems
from benchmarks.common import Bar, Report, parser, workplace
from benchmarks.questions import Question
from benchmarks.small_systems import Sizes

BUSY = 1.85  # processor seconds of a second of training on two idle processors
SUBJECT = "dog"  # of the question whose answer is yes or no
CHANCE = {"naming": 0.1, "yes-no": 0.5}
PACKAGES = ("edgevlm", "torch", "onnxruntime", "numpy")
TRAINING: dict[str, Any] = {
    "batch": 32,
    "micro_batch": 32,
    "rate": 1e-3,
    "warmup": 0.05,
    "weight_decay": 0.05,
}
TRIALS = (3, 33)  # steps
NAMES = "names.json"
R = TypeVar("R")


@dataclass(frozen=True)
class Used:
    """Processor seconds and seconds of a call."""

    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Figures:
    """One system. accuracy: share of right answers by precision and kind of question.

    changed: answers of the engine in float32 that are not torch's.
    """

    system: str
    parameters: int
    steps: int
    samples: int
    cpu_s: float
    wall_s: float
    loss: float
    asked: int
    changed: int
    accuracy: dict[str, dict[str, float]]


def timed(call: Callable[[], R]) -> tuple[R, Used]:
    """What a call returns and uses."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, Used(time.process_time() - cpu, time.perf_counter() - wall)


# -- training ------------------------------------------------------------------------------------


def train(model: Path, data: Path, out: Path, steps: int) -> Any:
    """Every parameter, by `edgevlm train all`."""
    from edgevlm import api

    schedule: dict[str, Any] = {"steps": steps, "log_every": 50}
    return api.train("all", str(model), out, data=[str(data)], **schedule, **TRAINING)


def steps_within(system: str, model: Path, work: Path, cpu_s: float) -> int:
    """How many steps fit into so many processor seconds: of two short runs on a few pictures."""
    data, used = work / "few" / questions.FILE, []
    for steps in TRIALS:
        out = work / f"{system}-trial"
        used.append(timed(partial(train, model, data, out, steps))[1].cpu_s)
        shutil.rmtree(out)
    each = (used[1] - used[0]) / (TRIALS[1] - TRIALS[0])
    return max(int((cpu_s - used[0]) / each), 1)


# -- answers -------------------------------------------------------------------------------------


def by_torch(
    checkpoint: Path, asked: Sequence[Question]
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Ids and texts."""
    from edgevlm.toolkit import systems
    from edgevlm.toolkit.checkpoints.layouts.source import Options
    from edgevlm.toolkit.text.tokenizer import Tokenizer

    source = systems.load(checkpoint, Options())
    ids = greedy.answers(source, [one.asked for one in asked])
    tokenizer = Tokenizer.from_text(source.tokenizer)
    return ids, [tokenizer.decode(answer) for answer in ids]


def by_engine(
    engine: Path, asked: Sequence[Question], eos: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Ids without the one that ends an answer, and texts."""
    from edgevlm import Question as Request
    from edgevlm import Session

    ids, found = [], []
    with Session.open(engine, threads=1) as session:
        for one in asked:
            answer = session.answer(Request(one.asked.question, [one.asked.picture], max_tokens=8))
            ids.append(tuple(token for token in answer.token_ids if token not in eos))
            found.append(answer.text)
    return ids, found


def accuracy(asked: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """The share of exact answers to each kind of question."""
    right: dict[str, list[bool]] = {kind: [] for kind in CHANCE}
    for one, text in zip(asked, texts, strict=True):
        right[one.kind].append(text.strip() == one.answer)
    return {kind: round(float(np.mean(values)), 4) for kind, values in right.items()}


# -- a system ------------------------------------------------------------------------------------


def measure(system: str, work: Path, asked: Sequence[Question], cpu_s: float) -> Figures:
    """Train, export, build, and ask everything three times; the figures are kept in `work`."""
    kept = work / f"{system}.json"
    if not kept.exists():
        facts = trained(system, work, cpu_s)
        found = compare(system, work, asked)
        kept.write_text(json.dumps({"system": system, **facts, **found}))
    return Figures(**json.loads(kept.read_text()))


def trained(system: str, work: Path, cpu_s: float) -> dict[str, Any]:
    """Train a new model of `system` as WORK/SYSTEM-trained; what that took."""
    kept = work / f"{system}-facts.json"
    if not kept.exists():
        model, out = work / f"{system}-new", work / f"{system}-trained"
        for folder in (model, out):
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
        names = json.loads((work / NAMES).read_text())
        small_systems.write(model, system, Sizes(), questions.texts(names, SUBJECT))
        steps = steps_within(system, model, work, cpu_s)
        say(f"{system}: {steps} steps")
        result, used = timed(partial(train, model, work / "data" / questions.FILE, out, steps))
        facts = {"parameters": result.parameters, "steps": steps, "samples": result.samples}
        facts |= {"loss": round(result.last_loss, 4)}
        facts |= {name: round(seconds, 1) for name, seconds in asdict(used).items()}
        kept.write_text(json.dumps(facts))
    found: dict[str, Any] = json.loads(kept.read_text())
    say(f"{system}: {found}")
    return found


def compare(system: str, work: Path, asked: Sequence[Question]) -> dict[str, Any]:
    """Accuracy before and after export, and how many answers changed."""
    from edgevlm import api

    checkpoint, bundle = work / f"{system}-trained", work / f"{system}-bundle"
    model = api.export_bundle(checkpoint, bundle, force=True).vlm
    ids, texts = by_torch(checkpoint, asked)
    found = {"torch": accuracy(asked, texts)}
    changed = 0
    for precision in (None, "int8"):
        engine = work / f"{system}-engine-{precision or 'float32'}"
        # Tiny linears may be faster in float: then float would be measured twice.
        api.build_engine(bundle, engine, precision=precision, keep_slower=True, force=True)
        others, texts = by_engine(engine, asked, model.prompts.eos)
        found[precision or "float32"] = accuracy(asked, texts)
        if precision is None:
            changed = sum(a != b for a, b in zip(ids, others, strict=True))
    return {"asked": len(asked), "changed": changed, "accuracy": found}


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def report(found: Sequence[Figures]) -> Report:
    """A row for each system, and bars: better than chance, nothing changed."""
    columns = ("system", "parameters", "steps", "CPU s", "wall s", "naming", "yes/no",
               "changed by export", "naming int8", "yes/no int8")  # fmt: skip
    result = Report("train_cifar", columns, PACKAGES)
    for f in found:
        before, small = f.accuracy["torch"], f.accuracy["int8"]
        kinds = tuple(CHANCE)
        shares = [
            f"{100 * precision[kind]:.1f} %" for precision in (before, small) for kind in kinds
        ]
        changed = f"{f.changed} of {f.asked:,}"
        row = (f.system, f"{f.parameters:,}", f.steps, round(f.cpu_s), round(f.wall_s))
        result.rows.append((*row, *shares[:2], changed, *shares[2:]))
        result.measured[f.system] = asdict(f)
        result.bars.append(Bar(f"{f.system}: naming", before["naming"], 0.3, at_least=True))
        result.bars.append(Bar(f"{f.system}: yes or no", before["yes-no"], 0.6, at_least=True))
        result.bars.append(Bar(f"{f.system}: answers changed by export", f.changed, 1))
    result.notes.append("chance: naming 10 %, yes/no 50 %")
    return result


def prepare(work: Path, folder: Path) -> None:
    """The training pictures as files, and a few of them for the trial that finds the steps."""
    if (work / NAMES).exists():
        return
    pictures = questions.read(folder / "train.npz")
    for name, some in (("few", pictures.first(600)), ("data", pictures)):
        shutil.rmtree(work / name, ignore_errors=True)
        questions.write(work / name, some, SUBJECT)
    (work / NAMES).write_text(json.dumps(pictures.names))


def lacks(folder: Path | None) -> str:
    """Why nothing can be measured; empty if all is there."""
    if folder is None:
        return "no pictures were named (--data FOLDER)"
    missing = [name for name in ("train.npz", "test.npz") if not (folder / name).is_file()]
    return f"{folder} has no {' and no '.join(missing)}" if missing else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--data", type=Path, help="train.npz and test.npz")
    command_line.add_argument("--systems", nargs="+", default=small_systems.SYSTEMS,
                              choices=small_systems.SYSTEMS)  # fmt: skip
    command_line.add_argument("--seconds", type=float, default=180, help="of training, each")
    command_line.add_argument("--pictures", type=int, default=3000, help="held-out ones")
    options = command_line.parse_args(arguments)
    lacking = lacks(options.data)
    if lacking:
        print(f"train_cifar: skipped: {lacking}")
        return 0
    return run(options)


def run(options: Namespace) -> int:
    """All systems in turn."""
    held_out = questions.read(options.data / "test.npz").first(options.pictures)
    asked = questions.of(held_out, SUBJECT)
    with workplace(options) as work:
        prepare(work, options.data)
        found = [measure(name, work, asked, BUSY * options.seconds) for name in options.systems]
        return 0 if report(found).finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
