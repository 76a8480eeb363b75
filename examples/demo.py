"""A tiny vision-language model learns digits, and is deployed: train, export, build, run, profile.

python -m examples.demo [OUT]     writes into OUT, by default demo-out/
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.digits import exam, model, page, scenes
from examples.digits.exam import KINDS, Graded, Scores
from examples.digits.scenes import Scene
from examples.steps import ROOT, command, output, run, say, title


@dataclass(frozen=True)
class Lesson:
    """A part of the training: so many scenes, with one of `counts` digits each; steps and rate."""

    name: str
    counts: tuple[int, ...]
    scenes: int
    steps: int
    rate: float


@dataclass(frozen=True)
class Plan:
    """How much is learned and asked. shown: held-out scenes on the page."""

    lessons: tuple[Lesson, ...]
    batch: int
    held_out: int
    shown: int


FULL = Plan(
    (
        Lesson("one digit", (1,), 8000, 400, 1e-3),
        Lesson("one to four digits", (1, 1, 1, 2, 3, 4), 12000, 500, 1e-3),
    ),
    batch=32,
    held_out=400,
    shown=12,
)


def main(plan: Plan = FULL) -> int:
    """Run all steps."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-out")
    folder = ROOT / out
    shutil.rmtree(folder / "training", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    introduce()
    held_out = step_scenes(folder, plan)
    trained, losses = step_train(out, plan)
    engines = step_deploy(out, trained)
    graded = {name: step_answers(out, name, engine, held_out) for name, engine in engines.items()}
    scores = {name: exam.scores(g for one in all_ for g in one) for name, all_ in graded.items()}
    step_results(out, held_out[: plan.shown], graded["float32"], scores, losses)
    step_profile(out)
    farewell(out)
    return 0


def introduce() -> None:
    """Explain what the demo does."""
    say(
        "edgevlm trains vision-language models, or reads trained ones, and makes engines that run "
        "without PyTorch. Here a model with two vision encoders (CLIP and DINOv2, merged as in "
        "COMM) begins with random weights, learns to name, count and point at handwritten digits, "
        "and answers from an engine about scenes that it has never seen."
    )


def step_scenes(folder: Path, plan: Plan) -> list[Scene]:
    """Training data and the held-out scenes; no digit image is in both."""
    title(1, "scenes: handwritten digits of scikit-learn, one to four on a canvas")
    images, values, training, held = scenes.split_digits()
    rng = np.random.default_rng(0)
    for number, lesson in enumerate(plan.lessons, 1):
        made = [
            scenes.scene(images, values, training, count, rng, turn=scenes.TURN)
            for count in rng.choice(lesson.counts, lesson.scenes).tolist()
        ]
        scenes.write(folder / "training", made, f"lesson-{number}", rng)
        print(f"{lesson.scenes:6,} scenes of {lesson.name} to learn from")
    held_out = [
        scenes.scene(images, values, held, 1 + number % scenes.MOST, rng)
        for number in range(plan.held_out)
    ]
    exam.write(folder / "training", held_out)
    print(f"{plan.held_out:6,} scenes to be asked about afterwards")
    say(
        f"Each scene has {scenes.SIDE} x {scenes.SIDE} pixels and a conversation: how many digits "
        f"there are, and of a lone one which it is and where. The {len(images):,} digit "
        f"images were split first: {len(held)} of them appear in the held-out scenes only."
    )
    return held_out


def step_train(out: Path, plan: Plan) -> tuple[Path, list[tuple[int, float]]]:
    """Random weights, then every lesson: the trained model, and the losses of logged steps."""
    title(2, "train: every parameter, from random weights")
    folder, start = out / "training", out / "training/random"
    model.write(ROOT / start)
    losses: list[tuple[int, float]] = []
    began, before = time.perf_counter(), 0
    for number, lesson in enumerate(plan.lessons, 1):
        trained = folder / f"model-{number}"
        run(
            *("train", "all", "--model", start, "--data", folder / f"lesson-{number}.json"),
            *("-o", trained, "--steps", lesson.steps, "--rate", lesson.rate),
            *("--batch", plan.batch, "--micro-batch", plan.batch, "--warmup", 0.1),
            *("--save-every", lesson.steps, "--log-every", max(lesson.steps // 10, 1)),
        )
        for line in (ROOT / trained / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            losses.append((before + entry["step"], entry["loss"]))
        start, before = trained, before + lesson.steps
    print(f"\n{before:,} steps in {time.perf_counter() - began:.0f} s")
    return start, losses


def step_deploy(out: Path, trained: Path) -> dict[str, Path]:
    """The trained model as a bundle, and engines of it in float and in 8 bits."""
    title(3, "export and build: one bundle, an engine in float and one in 8 bits")
    bundle = out / "bundle"
    engines = {"float32": out / "engine", "int8": out / "engine-int8"}
    run("export", trained, bundle, "--force", "--quiet")
    for precision, engine in engines.items():
        chosen = [] if precision == "float32" else ["--precision", precision, "--keep-slower"]
        output("build", bundle, engine, *chosen, "--force", "--quiet")
        size = sum(file.stat().st_size for file in (ROOT / engine).glob("*.safetensors"))
        print(f"an engine with weights of {size / 1e6:.2f} MB")
    return engines


def step_answers(
    out: Path, name: str, engine: Path, held_out: Sequence[Scene]
) -> list[list[Graded]]:
    """Ask an engine every question about the held-out scenes."""
    if name == "float32":
        title(4, "run: questions about scenes that it has never seen")
    answers = out / f"training/answers-{name}.jsonl"
    began = time.perf_counter()
    (ROOT / answers).unlink(missing_ok=True)
    output("run", engine, "--input", out / "training/exam.jsonl", "--output", answers, "--quiet")
    graded = exam.read(ROOT / answers, held_out)
    count = sum(map(len, graded))
    print(f"{count:,} answers in {time.perf_counter() - began:.1f} s")
    return graded


def step_results(
    out: Path,
    shown: Sequence[Scene],
    graded: Sequence[Sequence[Graded]],
    scores: dict[str, Scores],
    losses: Sequence[tuple[int, float]],
) -> None:
    """Print accuracies and a few answers, and write the page."""
    print()
    for one in [answer for answers in graded[:2] for answer in answers]:
        mark = "right" if one.right else f"wrong: {one.truth}"
        print(f"  {one.question:<48} {one.answer:<24} {mark}")
    print(f"\n{'right answers':<16}" + "".join(f"{kind:>12}" for kind in KINDS))
    for name, score in scores.items():
        print(f"{name:<16}" + "".join(f"{score.share(kind):>12.1%}" for kind in KINDS))
    print(f"{'questions':<16}" + "".join(f"{scores['float32'].asked[k]:>12,}" for k in KINDS))
    text = page.page(shown, graded[: len(shown)], scores, losses)
    (ROOT / out / "page.html").write_text(text)
    say(
        "A box counts where it overlaps the digit's by half or more (intersection over union). "
        f"{out / 'page.html'} shows held-out scenes with the boxes drawn in."
    )


def step_profile(out: Path) -> None:
    """Show where the time goes."""
    title(5, "profile: where each millisecond goes")
    image = out / "training/exam/00003.png"
    run("profile", out / "engine", "--image", image, "--html", out / "profile.html", "--quiet")
    say(
        "The floor is the shortest time that this machine's measured arithmetic and memory rate "
        "allow for a stage; reached is floor over measured. A model this small is all overhead; "
        f"floors matter for real ones. {out / 'profile.html'} shows the same as a page."
    )


def farewell(out: Path) -> None:
    """Suggest what to do next."""
    title(6, "what to try next")
    image = out / "training/exam/00003.png"
    ask = command("run", out / "engine", scenes.POINT, "--image", image)
    print(f"another question       {ask}")
    print("a published system     docs/systems.md, and `edgevlm train --help` for its stages")
    print("exactness              make demo-exact: the original LLaVA's answer, token for token")
    print("every verb and option  docs/cli.md")


if __name__ == "__main__":
    sys.exit(main())
