"""What the benchmarks share: child processes with their peak memory, medians, tables, results.

This module imports the standard library only: on Linux the memory of a process counts towards the
peak of those that it starts, so it has to stay small, and other programs' environments read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EDGEVLM = [sys.executable, "-m", "edgevlm.cli"]
QUIET_SHARE = 0.05  # a sample counts as undisturbed if others used less of the processors


# -- other work on the machine -----------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """Processor seconds that the machine and this process have used so far, and the time."""

    machine_s: float
    own_s: float
    at_s: float

    @classmethod
    def now(cls) -> Moment:
        """Machine seconds are 0 if the system does not report them."""
        own = os.times()
        return cls(_machine_s(), sum(own[:4]), time.perf_counter())

    def share_elsewhere(self) -> float:
        """The share of the processors that other processes have used since."""
        later = Moment.now()
        others = (later.machine_s - self.machine_s) - (later.own_s - self.own_s)
        return max(0.0, others / ((os.cpu_count() or 1) * (later.at_s - self.at_s)))


def _machine_s() -> float:
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return 0.0
    ticks = [int(f) for f in fields]
    return (sum(ticks[:3]) + sum(ticks[5:8])) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(limit_s: float = 30.0) -> None:
    """Return when others have left the processors alone for 0.3 s, or after `limit_s`."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < limit_s:
        since = Moment.now()
        time.sleep(0.3)
        if since.share_elsewhere() < QUIET_SHARE:
            return


# -- children ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A child process that succeeded. peak_rss_mb is its own, not that of its children."""

    seconds: float
    peak_rss_mb: float
    elsewhere: float
    stdout: str


def child(command: Sequence[str], cwd: Path = ROOT) -> Finished:
    """Run a command to its end; exits with its error output if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        since = Moment.now()
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        stdout = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - since.at_s
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1024)
    return Finished(seconds, peak, since.share_elsewhere(), stdout)


def edgevlm(*arguments: str | Path, cwd: Path = ROOT) -> Finished:
    """Run a verb of the command line quietly."""
    return child([*EDGEVLM, *map(str, arguments), "--quiet"], cwd)


# -- results -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    min: float
    max: float
    runs: int

    def __str__(self) -> str:
        if self.runs == 1:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} [{self.min:.3g}-{self.max:.3g}]"


def spread(values: Sequence[float], digits: int = 3) -> Spread:
    """Median, smallest and largest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return Spread(round(middle, digits), round(low, digits), round(high, digits), len(values))


@dataclass(frozen=True)
class Bar:
    """A bar: `measured` must stay below `limit` (above it, if `at_least`)."""

    what: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the bar holds."""
        return self.measured >= self.limit if self.at_least else self.measured < self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<"
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return f"bar: {self.what} {sign} {self.limit:g}: {self.measured:.3g}, {verdict}"


@dataclass
class Report:
    """One benchmark's result: a table for people, measurements for machines, bars for both."""

    benchmark: str
    columns: Sequence[str]
    packages: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def finish(self, options: argparse.Namespace) -> bool:
        """Print and save as the options ask; whether all bars hold."""
        data = self._data()
        if options.json:
            print(json.dumps(data))
        else:
            from edgevlm.toolkit.terminal.console import table

            bars = [str(bar) for bar in self.bars]
            lines = [*table(self.columns, self.rows), *self.notes, *bars]
            print(f"{self.benchmark}: {data['device']['processor']}", *lines, "", sep="\n")
        if options.save:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{self.benchmark}.json"
            path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return all(bar.holds for bar in self.bars)

    def _data(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "date": time.strftime("%Y-%m-%d"),
            "device": machine(),
            "versions": {name: version(name) for name in self.packages},
            "measured": {k: _plain(v) for k, v in self.measured.items()},
            "bars": [asdict(bar) | {"holds": bar.holds} for bar in self.bars],
            "notes": self.notes,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def machine() -> dict[str, Any]:
    """The machine that was measured on, without its name."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# -- command line ------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    command_line = argparse.ArgumentParser(description=description)
    command_line.add_argument("--json", action="store_true", help="print one JSON object")
    command_line.add_argument(
        "--save", action="store_true", help="write benchmarks/results/NAME.json"
    )
    command_line.add_argument("--work", type=Path, help="a folder that keeps models between runs")
    return command_line


@contextmanager
def workplace(options: argparse.Namespace) -> Iterator[Path]:
    """The folder for models: --work, or one that is removed at the end."""
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        yield options.work.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="edgevlm-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
