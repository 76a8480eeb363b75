"""How a run is told: a progress bar or lines on stderr, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import needing
from edgevlm.training.loop import EvalRecord, StepRecord

METRICS = "metrics.jsonl"


class Silent:
    """The reporter of every process but the first."""

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def evaluated(self, record: EvalRecord) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Report:
    """Writes OUT/metrics.jsonl and shows progress; say: prints a line, for what is no terminal.

    begun: the step from which this call goes on.
    unit: what is counted, in the singular: token or image.
    """

    def __init__(
        self,
        out: Path,
        steps: int,
        say: Callable[[str], None],
        *,
        begun: int = 0,
        quiet: bool,
        tensorboard: bool,
        unit: str = "token",
    ) -> None:
        self._begun, self._unit = begun, unit
        self._file = (out / METRICS).open("a", encoding="utf-8")
        self._say = say
        self._writer = _tensorboard(out) if tensorboard else None
        self._bar = _Bar(steps, begun, unit) if sys.stderr.isatty() and not quiet else None

    def step(self, record: StepRecord) -> None:
        """A logged step."""
        self._write("step", self._named(asdict(record), "pace", f"{self._unit}s_per_s"))
        if self._bar is not None:
            self._bar.show(record)
            return
        done = max(record.step - self._begun, 1)
        left = (record.steps - record.step) * record.seconds / done
        self._say(
            f"step {record.step}/{record.steps}  loss {record.loss:.4f}  "
            f"{record.pace:,.0f} {self._unit}s/s  {_duration(left)} left"
            + (f"  {record.faults} samples skipped or cut" if record.faults else "")
        )

    def evaluated(self, record: EvalRecord) -> None:
        """An evaluation on held-out data."""
        self._write("eval", self._named(asdict(record), "accuracy", f"{self._unit}_accuracy"))
        line = f"held-out loss {record.loss:.4f}, {record.accuracy:.1%} of {self._unit}s right"
        if self._bar is not None:
            self._bar.note(f"step {record.step}: {line}")
        else:
            self._say(f"step {record.step}: {line}")

    def close(self) -> None:
        """End the bar, close the files."""
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _named(self, values: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
        return {name if k == key else k: value for k, value in values.items()}

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if name not in ("step", "steps"):
                    self._writer.add_scalar(f"{kind}/{name}", value, values["step"])


def cut_back(out: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl behind a step from which a run goes on, torn ones too."""
    path = out / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def _tensorboard(out: Path) -> Any:
    with needing("tensorboard", "train", purpose="--tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(out / "tensorboard"))


class _Bar:
    """Rich's progress bar with loss, rate and the time that is left."""

    def __init__(self, steps: int, begun: int, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} " + f"{unit}s/s"),
            Remaining(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=steps, completed=begun, loss="-", rate="-")
        self._progress.start()

    def show(self, record: StepRecord) -> None:
        self._progress.update(
            self._task,
            completed=record.step,
            loss=f"{record.loss:.4f}",
            rate=f"{record.pace:,.0f}",
        )

    def note(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


def _duration(seconds: float) -> str:
    """75 -> "1:15"."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    clock = f"{minutes}:{whole % 60:02d}"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else clock


def losses(out: Path) -> list[float]:
    """The losses of the logged steps, in order."""
    lines = map(json.loads, (out / METRICS).read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]
