"""The training loop: steps over micro-batches, evaluation, metrics, states to resume from.

accelerate decides where and how it runs: one process, several (DDP), sharded (FSDP2, DeepSpeed).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgevlm.toolkit.errors import ToolkitError
from edgevlm.training.optimizer import set_rates
from edgevlm.training.options import Schedule
from edgevlm.training.vlm import Batch

Micro = Sequence[Batch]  # the micro-batches of one optimizer step, those of this process


class Task(Protocol):
    """What a model is trained for: which targets a batch has, and the loss of the model on them."""

    def counts(self, batch: Batch) -> tuple[int, int, int]:
        """Targets, units that are told as speed (tokens, images), and samples of a batch."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the targets of the batch; each process differentiates its own."""

    def judge(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of a held-out batch, float64 [3]: summed loss, right targets, targets."""


class Reporter(Protocol):
    """Who is told how training goes; every process has one, all but the first are silent."""

    def step(self, record: StepRecord) -> None: ...

    def evaluated(self, record: EvalRecord) -> None: ...


@dataclass(frozen=True)
class Schedules:
    """When things happen. steps: the last step; the others are distances in steps, 0 for never."""

    steps: int
    warmup: int
    kind: Schedule
    log_every: int
    save_every: int
    eval_every: int


@dataclass
class Progress:
    """How far training has come: optimizer steps, samples and targets seen; it is saved and loaded.

    faults: samples that were skipped or cut short, by name, each with its kind and reason.
    """

    step: int = 0
    samples: int = 0
    targets: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict."""
        vars(self).update(state)


@dataclass(frozen=True)
class StepRecord:
    """One logged step: means since the last one. loss is per target; rates before this step.

    pace: tokens or images per second.
    """

    step: int
    steps: int
    loss: float
    rate: float
    gradient_norm: float
    samples: int
    targets: int
    pace: float
    seconds: float
    faults: int


@dataclass(frozen=True)
class EvalRecord:
    """The held-out data after a step: loss per target, share of targets that were right."""

    step: int
    loss: float
    accuracy: float
    targets: int


@dataclass
class _Window:
    """What happened since the last logged step, summed over all processes."""

    loss: float = 0.0
    targets: float = 0.0
    units: float = 0.0
    norm: float = 0.0
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)


@dataclass
class Trainer:
    """What a run works with. optimizers: that of the model first; the others' gradients are not
    clipped. save: writes a state; averaged: told after each step, for the EMA.
    """

    accelerator: Any
    task: Task
    model: nn.Module
    optimizers: Sequence[Any]
    clip: float
    schedules: Schedules
    reporter: Reporter
    save: Callable[[Progress], None]
    averaged: Callable[[], None] | None = None

    def fit(
        self,
        feed: Iterable[Micro],
        progress: Progress,
        held_out: Callable[[], Iterator[Batch]] | None = None,
    ) -> None:
        """Train until the last step; `feed` begins with the step that `progress` has reached.

        Raises ToolkitError if the loss is no number, or the data ends early.
        """
        window, started = _Window(), time.perf_counter()
        self.model.train()
        for micro in feed:
            if progress.step >= self.schedules.steps:
                break
            self._step(micro, progress, window)
            if self._due(progress.step, self.schedules.log_every):
                self._log(progress, window, started)
                window = _Window()
            going_on = progress.step < self.schedules.steps  # after the last step others evaluate
            if held_out and going_on and self._due(progress.step, self.schedules.eval_every):
                self.reporter.evaluated(self.evaluate(held_out(), progress.step))
                self.model.train()
            if progress.step % self.schedules.save_every == 0:
                self.save(progress)
        if progress.step < self.schedules.steps:
            raise ToolkitError(
                f"the data ended at step {progress.step} of {self.schedules.steps}",
                hint="lower --steps, or check that no shard was cut short",
            )

    def _due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.schedules.steps)

    def _step(self, micro: Micro, progress: Progress, window: _Window) -> None:
        s = self.schedules
        for optimizer in self.optimizers:
            set_rates(optimizer, progress.step, s.steps, s.warmup, s.kind)
        local = torch.tensor([self.task.counts(b) for b in micro], dtype=torch.float64).sum(0)
        targets, units, samples = self._sum(local).tolist()
        loss = self._backward(micro, max(targets, 1.0))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged()
        progress.step += 1
        progress.samples += int(samples)
        progress.targets += int(targets)
        window.loss += float(self._sum(loss.double().cpu().reshape(1)))
        window.targets += targets
        window.units += units
        window.norm += float(norm) if norm is not None else 0.0
        window.steps += 1
        if not window.loss < float("inf"):
            raise ToolkitError(
                f"the loss of step {progress.step} is {window.loss}; training has diverged",
                hint="lower --rate, or go on from an earlier state with other data",
            )

    def _backward(self, micro: Micro, targets: float) -> Tensor:
        """Gradients of the mean over all targets of the step; returns the local sum of losses.

        DDP and FSDP average gradients over processes, so that each loss is scaled by their number.
        """
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(micro):
            last = number + 1 == len(micro)
            waiting: AbstractContextManager[Any] = (
                nullcontext() if last else self.accelerator.no_sync(self.model)
            )
            with waiting:
                loss = self.task.loss(self.model, batch)
                self.accelerator.backward(loss * (self.accelerator.num_processes / targets))
            total += loss.detach()
        return total

    def _sum(self, value: Tensor) -> Tensor:
        """Summed over the processes."""
        if self.accelerator.num_processes == 1:
            return value
        moved = value.to(self.accelerator.device, torch.float32)
        total: Tensor = self.accelerator.reduce(moved, "sum").cpu()
        return total

    def _log(self, progress: Progress, window: _Window, started: float) -> None:
        now = time.perf_counter()
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            progress.faults = dict(gather_object(list(progress.faults.items())))
        self.reporter.step(
            StepRecord(
                progress.step,
                self.schedules.steps,
                window.loss / max(window.targets, 1.0),
                max(group["lr"] for group in self.optimizers[0].param_groups),
                window.norm / max(window.steps, 1),
                progress.samples,
                progress.targets,
                window.units / max(now - window.started, 1e-9),
                now - started,
                len(progress.faults),
            )
        )

    def evaluate(self, batches: Iterator[Batch], step: int) -> EvalRecord:
        """Loss and accuracy on held-out batches, of which each process has its own."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                sums += self.task.judge(self.model, batch)
        loss, right_count, count = self._sum(sums).tolist()
        count = max(count, 1.0)
        return EvalRecord(step, loss / count, right_count / count, int(count))
