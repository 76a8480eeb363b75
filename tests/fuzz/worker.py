"""A process that checks cases, and tells of each before and after: `run.py` reads it.

A case may take 5 seconds of processor time and 500 MB more memory than the process had. Python code
that takes longer is interrupted; code below Python is left to the watchdog, which ends the process
with a traceback, so that the case that was begun and not ended is known.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.cases import named
from tests.fuzz.frame import Cases, Place, Violation

MOST_SECONDS = 5.0
MOST_MB = 500.0
_WATCHDOG_SECONDS = 40.0  # of the wall clock: other processes may be busy
_ADDRESS_SPACE = 4 << 30  # more than the process has at its begin
_FRAMES = 6
_STATUS = Path("/proc/self/status")
_PEAK_RESET = Path("/proc/self/clear_refs")


class Hang(BaseException):
    """A case took too long."""


def main() -> None:
    """Check the cases named on stdin, a class and a key a line; answer each on stdout."""
    ready, out = Path(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print there is not an answer
    faulthandler.enable()
    signal.signal(signal.SIGPROF, _stop)
    work = Path(tempfile.mkdtemp(prefix="edgevlm-fuzz-"))
    kinds: dict[str, tuple[Cases[Any], dict[str, Any]]] = {}
    try:
        for line in sys.stdin.read().splitlines():
            name, _, key = line.partition(" ")
            if name not in kinds:
                made = named(name)(Place(ready, work))
                kinds[name] = made, dict(made.seeds())
                _limit_memory()
            print(json.dumps({"begun": [name, key]}), file=out, flush=True)
            print(json.dumps(_tried(*kinds[name], key)), file=out, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _stop(number: int, frame: object) -> None:
    raise Hang


def _limit_memory() -> None:
    """A case that wants the whole machine gets a MemoryError, which is a finding."""
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
        if line.startswith("VmSize:"):
            most = 1024 * int(line.split()[1]) + _ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def case_of(kind: Cases[Any], seeds: dict[str, Any], key: str) -> Any:
    """The case of a key: `=NAME` is a seed itself, a number decides seed and mutation."""
    if key.startswith("="):
        return seeds[key[1:]]
    rng = Random(f"{kind.name} {key}")
    return kind.mutate(rng, seeds[rng.choice(sorted(seeds))])


def _tried(kind: Cases[Any], seeds: dict[str, Any], key: str) -> dict[str, Any]:
    found, outcome = "", ""
    case = case_of(kind, seeds, key)
    before, begun = _peak_from_here(), time.process_time()
    try:
        with _watched(), warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = kind.check(case)
    except Violation as broken:
        found = str(broken)
    except Hang:
        found = f"hang: more than {MOST_SECONDS:g} s at {_where(sys.exc_info()[2])}"
    except BaseException as escaped:  # a panic of Rust is no Exception
        if isinstance(escaped, KeyboardInterrupt):
            raise
        last = "".join(traceback.format_tb(escaped.__traceback__)[-_FRAMES:])
        found = f"escaped: {type(escaped).__name__}: {escaped!s:.200}\n{last}"
    seconds, grown = time.process_time() - begun, _peak_mb() - before
    if not found and grown > MOST_MB:
        found = f"memory: {grown:.0f} MB more"
    if not found and seconds > MOST_SECONDS:
        found = f"hang: {seconds:.1f} s of processor time"
    ended = {"found": found, "outcome": outcome, "seconds": seconds, "mb": grown}
    return ended | ({"case": f"{case!a:.400}"} if found else {})


@contextmanager
def _watched() -> Iterator[None]:
    faulthandler.dump_traceback_later(_WATCHDOG_SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def _where(trace: Any) -> str:
    last = [frame for frame in traceback.extract_tb(trace) if frame.name != _stop.__name__][-1]
    return f"{last.filename}:{last.lineno} {last.name}"


def _peak_from_here() -> float:
    """Forget the highest memory until now, where Linux can; the memory in MB."""
    try:
        _PEAK_RESET.write_text("5")
    except OSError:
        return _peak_mb()
    return _peak_mb()


def _peak_mb() -> float:
    """The most memory that this process has had, since `_peak_from_here` where Linux can."""
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
