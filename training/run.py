"""A run of any stage once it is set up: its folder, its states, the loop, what it came to.

OUT/training.json     what the run is; with it a killed run is resumed
OUT/metrics.jsonl     loss, rate, speed: a line for each logged step and evaluation
OUT/states/           the last two states
OUT/training.lock     held while the run is at work
"""

from __future__ import annotations

import json
import math
import os
import resource
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from edgevlm.toolkit.bundle.publish import entries
from edgevlm.toolkit.bundle.unfinished import try_lock
from edgevlm.toolkit.errors import ConfigError, OutputError
from edgevlm.toolkit.strict import read_json
from edgevlm.training import states
from edgevlm.training.averages import Average
from edgevlm.training.loop import EvalRecord, Progress, Schedules, Task, Trainer
from edgevlm.training.options import Schedule, TrainOptions
from edgevlm.training.report import Report, Silent, cut_back, losses
from edgevlm.training.setup import Feeds, Say
from edgevlm.training.vlm import parameter_count

FACTS, LOCK = "training.json", "training.lock"


@dataclass(frozen=True)
class Home:
    """Where a run lives, and how it is told. facts: what must be the same for it to be resumed."""

    out: Path
    resume: bool
    options: TrainOptions
    facts: Mapping[str, Any]
    made_by: str
    say: Say
    quiet: bool
    held: list[int] = field(default_factory=list)  # descriptors of the lock, while it is held

    def hold(self) -> None:
        """Take OUT for this process. Raises OutputError if another run is at work there."""
        descriptor = os.open(self.out / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        if try_lock(descriptor) is False:
            os.close(descriptor)
            raise OutputError(
                f"another run is at work in {self.out}",
                hint="wait for it, or train into another folder",
            )
        self.held.append(descriptor)
        weakref.finalize(self, _let_go, self.held)

    def let_go(self) -> None:
        """Let other runs have OUT."""
        _let_go(self.held)


def _let_go(held: list[int]) -> None:
    while held:
        os.close(held.pop())


@dataclass(frozen=True)
class Result:
    """What a run came to. first_loss, last_loss: of the first and last logged step.

    faults: samples that were skipped or cut short, by kind. seconds: of this call. processes: how
    many took part, and how (accelerate's name of it). process: which of them tells this. tower: the
    kind of a tower that was trained by itself; then eval_image_accuracy stands for the accuracy of
    tokens.
    """

    stage: str
    out: str
    steps: int
    samples: int
    targets: int
    parameters: int
    trained_parameters: int
    first_loss: float | None
    last_loss: float | None
    eval_loss: float | None
    eval_token_accuracy: float | None
    faults: Mapping[str, int]
    seconds: float
    peak_rss_mb: float
    processes: int
    distribution: str
    process: int
    tower: str | None = None
    eval_image_accuracy: float | None = None


@dataclass(frozen=True)
class Run:
    """A run that is set up. model: as accelerate wrapped it; bare: without that.

    optimizers: the model's first. unit: what its speed is told in, in the singular.
    """

    home: Home
    stage: str
    accelerator: Any
    progress: Progress
    feeds: Feeds
    task: Task
    bare: nn.Module
    model: Any
    optimizers: tuple[Any, ...]
    warmup: float
    schedule: Schedule
    average: Average | None
    unit: str = "token"

    @property
    def steps(self) -> int:
        """The last step."""
        return int(self.home.facts["steps"])


def check_out(out: Path, *, resume: bool) -> None:
    """Raise OutputError where a run would overwrite something, or has nothing to go on with."""
    if resume:
        if not (out / FACTS).exists():
            raise OutputError(
                f"{out} holds no run to resume", hint="leave --resume out to begin one"
            )
    elif out.exists() and (not out.is_dir() or entries(out)):
        hint = "--resume goes on with the run" if (out / FACTS).exists() else "choose another"
        raise OutputError(f"{out} exists", hint=hint)


def open_home(home: Home, accelerator: Any) -> None:
    """Make OUT with its training.json, or see that the run in it is this one."""
    path = home.out / FACTS
    if accelerator.is_main_process:
        home.out.mkdir(parents=True, exist_ok=True)
        home.hold()
    if home.resume:
        states.check_same(read_json(path), home.facts, path)
    elif accelerator.is_main_process:
        stated = {**home.facts, "options": asdict(home.options), "made_by": home.made_by}
        path.write_text(json.dumps(stated, indent=1), "utf-8")
    accelerator.wait_for_everyone()


def go_on(run: Run) -> None:
    """Load the newest state in OUT if the run is resumed."""
    home = run.home
    if home.resume:
        states.resume(run.accelerator, home.out, run.progress, home.facts)
        home.say(f"going on after step {run.progress.step}")
        if run.accelerator.is_main_process:
            cut_back(home.out, run.progress.step)
    run.accelerator.wait_for_everyone()


def average_of(accelerator: Any, model: nn.Module, decay: float) -> Average | None:
    """The averaged weights that --ema asks for, in the run's states too; None without it.

    Raises ConfigError where weights are sharded.
    """
    if not decay:
        return None
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ConfigError(
            f"--ema is not implemented for {accelerator.distributed_type.value}",
            hint="leave --ema out where weights are sharded",
        )
    average = Average(model, decay)
    accelerator.register_for_checkpointing(average)
    return average


def fit(run: Run) -> EvalRecord | None:
    """Train to the last step, then evaluate on the held-out data if there is any."""
    home, steps = run.home, run.steps
    options = home.options
    report = (
        Report(
            home.out,
            steps,
            home.say,
            begun=run.progress.step,
            quiet=home.quiet,
            tensorboard=options.tensorboard,
            unit=run.unit,
        )
        if run.accelerator.is_main_process
        else Silent()
    )
    schedules = Schedules(
        steps,
        math.ceil(run.warmup * steps),
        run.schedule,
        options.log_every,
        options.save_every,
        options.eval_every,
    )

    def save(progress: Progress) -> None:
        states.save(run.accelerator, home.out, progress, home.facts)

    trainer = Trainer(
        run.accelerator,
        run.task,
        run.model,
        run.optimizers,
        options.clip,
        schedules,
        report,
        save,
        run.average.update if run.average else None,
    )
    held_out = run.feeds.held_out
    try:
        feed = run.feeds.training.steps(run.progress.step)
        trainer.fit(feed, run.progress, held_out.once if held_out else None)
        if held_out is None:
            return None
        final = trainer.evaluate(held_out.once(), steps)
        report.evaluated(final)
        return final
    finally:
        report.close()
        home.let_go()


def result(run: Run, final: EvalRecord | None, seconds: float, tower: str | None = None) -> Result:
    """What the run came to; final: its last evaluation."""
    accelerator, progress = run.accelerator, run.progress
    logged = losses(run.home.out) if accelerator.is_main_process else []
    everything, trained_count = parameter_count(run.bare)
    accuracy = final.accuracy if final else None
    return Result(
        stage=run.stage,
        out=str(run.home.out),
        steps=progress.step,
        samples=progress.samples,
        targets=progress.targets,
        parameters=everything,
        trained_parameters=trained_count,
        first_loss=logged[0] if logged else None,
        last_loss=logged[-1] if logged else None,
        eval_loss=final.loss if final else None,
        eval_token_accuracy=None if tower else accuracy,
        faults=run.feeds.faults.report().counts,
        seconds=seconds,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        processes=accelerator.num_processes,
        distribution=accelerator.distributed_type.value,
        process=accelerator.process_index,
        tower=tower,
        eval_image_accuracy=accuracy if tower else None,
    )
