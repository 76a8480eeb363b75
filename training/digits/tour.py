"""What `edgevlm demo` does: a tiny model learns to read pictures of digits, and is deployed.

OUT/scenes/         pictures, and questions about them
OUT/new, lesson-N/  the model with random weights, and after each lesson
OUT/bundle, bundle-int8, engine, engine-int8, answers-*.json, page.html, profile.html
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.toolkit.errors import MissingExtra
from edgevlm.toolkit.terminal.console import Console
from edgevlm.training.digits import exam, model, page, scenes
from edgevlm.training.digits.commands import Commands, folded, opened, shown
from edgevlm.training.digits.exam import KINDS, Graded, Scores
from edgevlm.training.digits.scenes import Scene

_FLOAT, _INT8 = "float32", "int8"
_NEEDED = ("onnxruntime", "onnx")
_FOR_TRAINING = ("torch", "accelerate")


@dataclass(frozen=True)
class Lesson:
    """A part of the training: so many scenes, each with one of `counts` as its number of digits."""

    name: str
    counts: tuple[int, ...]
    scenes: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """How much is learned and asked. calibrating: scenes that 8 bits are fitted to; held_out:
    scenes to be asked about; shown: those of them that are on the page.
    """

    lessons: tuple[Lesson, ...]
    batch: int
    calibrating: int
    held_out: int
    shown: int


FULL = Plan(
    (
        Lesson("one digit", (1,), 5000, 300),
        Lesson("one to four digits", (1, 1, 1, 2, 3, 4), 6000, 350),
    ),
    batch=32,
    calibrating=40,
    held_out=200,
    shown=12,
)


def take(
    out: Path, console: Console, made_by: str, *, train: bool, force: bool, plan: Plan = FULL
) -> tuple[Any, list[str], str]:
    """Do all steps in `out`; what is printed at the end, and the next command.

    train: else the model keeps its random weights, and torch is not needed. force: do again what an
    earlier call did. Raises MissingExtra, OutputError, and ToolkitError for a command that fails.
    """
    check_packages(train=train)
    tour = Tour(opened(out, console, made_by, force=force), out, plan, train)
    tour.introduce()
    held_out = tour.draw()
    trained = tour.learn() if train else tour.begin()
    engines = tour.deploy(trained)
    graded = tour.ask(engines, held_out)
    tour.profile(engines)
    scores = {name: exam.scores(g for one in all_ for g in one) for name, all_ in graded.items()}
    losses = tour.losses() if train else []
    text = page.page(held_out[: plan.shown], graded[_FLOAT][: plan.shown], scores, losses)
    (out / "page.html").write_text(text, encoding="utf-8")
    return tour.result(scores)


def check_packages(*, train: bool) -> None:
    """Raise MissingExtra for the first package that a step lacks, before any step is done."""
    for package in _NEEDED:
        if find_spec(package) is None:
            raise MissingExtra(package, "demo", purpose="the demo")
    for package in _FOR_TRAINING if train else ():
        if find_spec(package) is None:
            missing = MissingExtra(package, "demo", purpose="training")
            missing.hint += f", or leave training out: {shown('demo', '--no-train')}"
            raise missing


def _installing(extra: str, *packages: str) -> str:
    """What comes before a command that needs packages which are not here."""
    missing = any(find_spec(package) is None for package in packages)
    return f"pip install 'edgevlm[{extra}]' && " if missing else ""


class Tour:
    """The steps, one after another, in one folder."""

    def __init__(self, commands: Commands, out: Path, plan: Plan, train: bool) -> None:
        self.commands = commands
        self.out = out
        self.plan = plan
        self.train = train
        self.headings = 0

    def title(self, text: str) -> None:
        """A heading."""
        self.headings += 1
        line = f"-- {self.headings}. {text} "
        self.commands.say(f"\n{line:-<92}\n")

    def tell(self, text: str) -> None:
        """A paragraph."""
        self.commands.say("\n" + textwrap.fill(text, 92, break_on_hyphens=False))

    def introduce(self) -> None:
        """What is going to happen."""
        learning = (
            "begins with random weights, learns on this machine to count digits, to name a lone "
            "one and to point at it, and answers from an engine about pictures that it has never "
            "seen. That takes a few minutes, most of them training"
            if self.train
            else "has random weights, so that its answers are noise; all else is as with a trained "
            "one. That takes half a minute"
        )
        self.tell(
            "edgevlm trains vision-language models, or reads trained ones, and makes engines that "
            "run without PyTorch. Here a model of 0.8 million parameters with two vision encoders "
            f"(CLIP and DINOv2, merged as in COMM) {learning}. Every command is shown as you would "
            "type it."
        )

    # -- the steps -----------------------------------------------------------------------------

    def draw(self) -> list[Scene]:
        """Write the data; the scenes to be asked about."""
        self.title("data: pictures of digits, drawn as hands write them")
        folder, plan = self.out / "scenes", self.plan
        for number, lesson in enumerate(plan.lessons if self.train else (), 1):
            self.draw_lesson(folder, number, lesson)
        rng = np.random.default_rng(0)
        calibrating, held_out = (
            [scenes.draw(1 + number % scenes.MOST, rng) for number in range(count)]
            for count in (plan.calibrating, plan.held_out)
        )
        exam.write_samples(folder, "samples", calibrating)
        exam.write(folder, held_out)
        self.commands.say(f"{plan.calibrating:6,} scenes to fit 8 bits to")
        self.commands.say(f"{plan.held_out:6,} scenes to be asked about afterwards")
        self.tell(
            f"Each has {scenes.SIDE} x {scenes.SIDE} pixels, and questions: how many digits there "
            "are, and of a lone one which it is and where. Every digit is drawn anew, bent, "
            "slanted and thickened at random."
        )
        return held_out

    def draw_lesson(self, folder: Path, number: int, lesson: Lesson) -> None:
        """Write the data of a lesson, unless it is there: it was before the first command."""
        name = f"lesson-{number}"
        if not (self.commands.earlier and (folder / f"{name}.json").exists()):
            rng = np.random.default_rng(number)
            counts = rng.choice(lesson.counts, lesson.scenes).tolist()
            scenes.write(folder, [scenes.draw(count, rng) for count in counts], name, rng)
        self.commands.say(f"{lesson.scenes:6,} scenes of {lesson.name} to learn from")

    def begin(self) -> Path:
        """The model with random weights."""
        new = self.out / "new"
        model.write(new, self.commands.made_by)
        return new

    def learn(self) -> Path:
        """Random weights, then every lesson; the trained model."""
        self.title("train: every parameter, from random weights")
        start = self.begin()
        for number, lesson in enumerate(self.plan.lessons, 1):
            trained = self.lesson(number)
            self.commands.make(
                f"train-{number}",
                *("train", "all", "--model", start),
                *("--data", self.out / f"scenes/lesson-{number}.json", "-o", trained),
                *("--steps", lesson.steps, "--warmup", 0.1, "--batch", self.plan.batch),
                *("--micro-batch", self.plan.batch, "--log-every", max(lesson.steps // 10, 1)),
                result=trained,
                resumable=True,
            )
            start = trained
        return start

    def lesson(self, number: int) -> Path:
        """The model after a lesson."""
        return self.out / f"lesson-{number}"

    def deploy(self, trained: Path) -> dict[str, Path]:
        """The model as bundles and engines, in float and in 8 bits."""
        make, out = self.commands.make, self.out
        bundle, engine = out / "bundle", out / "engine"
        bundles = {_FLOAT: bundle, _INT8: out / "bundle-int8"}
        engines = {_FLOAT: engine, _INT8: out / "engine-int8"}
        self.title("export: a bundle, with an ONNX graph for each component")
        make("export", "export", trained, bundle, "--force", "-q", result=bundle)
        self.title("calibrate: weights and activations in 8 bits, fitted to sample pictures")
        make(
            "calibrate",
            *("calibrate", bundle, bundles[_INT8], "--to", "int8-static", "--smooth", 0.5),
            *("--prompts", out / "scenes/samples.jsonl", "--force"),
            result=bundles[_INT8],
        )
        self.title("build: engines for this machine's processor, compared with the reference")
        for name, made in engines.items():
            make(f"build-{name}", "build", bundles[name], made, "--force", "-q", result=made)
            self.commands.say()
        return engines

    def ask(
        self, engines: dict[str, Path], held_out: Sequence[Scene]
    ) -> dict[str, list[list[Graded]]]:
        """What each engine answers about the held-out scenes."""
        self.title("run: questions about pictures that it has never seen")
        run, first = self.commands.run, scenes.questions(held_out[0])
        run("run", *self.question(engines[_FLOAT], 0, first[1].question))
        count = sum(len(scenes.questions(scene)) for scene in held_out)
        self.tell(
            f"The picture shows a {first[1].answer}. Now all {count} questions about "
            f"{len(held_out)} pictures, to both engines:"
        )
        graded = {}
        for name, engine in engines.items():
            answers = self.out / f"answers-{name}.json"
            every = ("run", engine, "--input", self.out / "scenes/exam.jsonl", "--json")
            self.commands.say()
            run(f"run-{name}", *every, into=answers)
            graded[name] = exam.read(answers, held_out)
        return graded

    def question(self, engine: Path, number: int, text: str) -> tuple[object, ...]:
        """The command that asks about a held-out scene."""
        return "run", engine, text, "--image", self.picture(number)

    def picture(self, number: int) -> Path:
        """A held-out scene."""
        return self.out / f"scenes/exam/{number:05d}.png"

    def profile(self, engines: dict[str, Path]) -> None:
        """Show where the time goes."""
        self.title("profile: where each millisecond goes")
        self.commands.run(
            "profile",
            *("profile", engines[_FLOAT], "--compare", engines[_INT8]),
            *("--image", self.picture(3), "--html", self.out / "profile.html", "-q"),
        )
        self.tell(
            "The floor is the shortest time that this machine's measured arithmetic and memory "
            "rate allow for a stage. A model this small is all overhead: 8 bits pay where weights "
            "are large."
        )

    def losses(self) -> list[tuple[int, float]]:
        """Of the logged steps of all lessons, one after another."""
        found, before = [], 0
        for number, lesson in enumerate(self.plan.lessons, 1):
            lines = (self.lesson(number) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines]
            found += [(before + entry["step"], entry["loss"]) for entry in entries]
            before += lesson.steps
        return found

    # -- the end -------------------------------------------------------------------------------

    def result(self, scores: dict[str, Scores]) -> tuple[Any, list[str], str]:
        """What is printed at the end."""
        following = self.following()
        data = {
            "kind": "demo",
            "out": str(self.out),
            "trained": self.train,
            "steps": {name: asdict(step) for name, step in self.commands.steps.items()},
            "scores": {name: asdict(score) for name, score in scores.items()},
            "page": str(self.out / "page.html"),
            "profile": str(self.out / "profile.html"),
            "next": following["another question"],
        }
        self.title("what it has learned" if self.train else "what came out")
        lines = [
            f"{'right answers':<16}" + "".join(f"{kind:>12}" for kind in KINDS),
            *(
                f"{name:<16}" + "".join(f"{score.share(kind):>12.1%}" for kind in KINDS)
                for name, score in scores.items()
            ),
            f"{'questions':<16}" + "".join(f"{scores[_FLOAT].asked[k]:>12,}" for k in KINDS),
            "",
            f"the pictures, with its answers drawn in:  {self.out / 'page.html'}",
            f"where the time goes, as a page:           {self.out / 'profile.html'}",
        ]
        if not self.commands.console.quiet:
            lines += ["", "What to try next:", ""]
            for what, command in following.items():
                lines += [f"  {what}:", textwrap.indent(folded(command), "    ")]
        return data, lines, ""

    def following(self) -> dict[str, str]:
        """Commands to try next, by what they are for."""
        out, engine = self.out, self.out / "engine"
        serve = _installing("serve", "fastapi", "uvicorn") + shown("serve", engine)
        found = {"another question": shown(*self.question(engine, 4, scenes.POINT))}
        if self.train:
            last = len(self.plan.lessons)
            data = out / f"scenes/lesson-{last}.json"
            words = "train", "all", "--model", self.lesson(last), "--data", data
            found["another lesson"] = shown(*words, "-o", self.lesson(last + 1), "--steps", 200)
        else:
            found["the same with training"] = _installing("demo", "torch") + shown("demo", out)
        return found | {
            "a conversation": shown("chat", engine),
            "a server with OpenAI's API, and a page": serve,
            "what a real model needs on other machines": shown(
                *("plan", "preset:llava-1.5-7b", "--target", "jetson-agx-orin,rtx-4090,h100"),
                *("--precision", "fp16,int4"),
            ),
            "a real size with random weights (3.1 GB)": shown(
                "export", "preset:llava-qwen2-0.5b", out / "half", "--random-weights"
            ),
            "your own checkpoint": shown("export", "CHECKPOINT_FOLDER", "BUNDLE"),
            "what this machine has": shown("doctor"),
        }
