"""python -m tests.fuzz [N [SEED [CLASS ...]]], or `repeat CLASS KEY`; 1 if something was found."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.conftest import HERE
from tests.fuzz.run import Report, check, jobs_of, seeds_of
from tests.pipeline import engine_of


def main(words: list[str]) -> int:
    """Check the seeds and N mutations (2000), numbered from SEED (0) on."""
    with tempfile.TemporaryDirectory(prefix="edgevlm-fuzz-") as folder:
        ready = Path(folder)
        engine_of(HERE / "goldens/e2e_llava15/llava-v1.5-tiny", ready)
        if words[:1] == ["repeat"]:
            jobs = [f"{words[1]} {words[2]}"]
        else:
            count, seed = int(words[0] if words else 2000), int(words[1] if words[1:] else 0)
            jobs = [*seeds_of(ready, ready, words[2:]), *jobs_of(count, seed, words[2:])]
        report = check(jobs, ready, lambda found: print(found, flush=True))
    _print(report)
    return 1 if report.findings else 0


def _print(report: Report) -> None:
    for outcome, number in sorted(report.outcomes.items()):
        print(f"{number:7} {outcome}")
    print(f"slowest: {report.slowest[0]:.2f} s ({report.slowest[1]})")
    print(f"most memory: {report.largest[0]:.0f} MB more ({report.largest[1]})")
    print(f"{len(report.findings)} finding(s) in {report.outcomes.total()} cases")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
