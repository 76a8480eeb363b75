"""All that a graphics card shows, in one run of at most six minutes: `make gpu`.

Kernels first (torch and Triton), then whole engines (onnxruntime-gpu), each in a process of its own
with what is left of the time; where one cannot run, the others do. Any Python from 3.10, with
edgevlm installed or not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT

PARTS = (
    ("benchmarks.gpu_kernels", ()),
    ("edgevlm.engines.plugins.selftest", ()),
    ("benchmarks.gpu_decode", ("--save",)),
)


def run(module: str, arguments: Sequence[str], place: Path, left_s: float) -> str:
    """How a part ended: "ok", "failed" or "out of time"."""
    paths = [str(place), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=left_s, check=False)
    except subprocess.TimeoutExpired:
        return "out of time"
    return "ok" if done.returncode == 0 else "failed"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a part did not end well."""
    command_line = argparse.ArgumentParser(description=__doc__)
    command_line.add_argument("--seconds", type=float, default=360.0, help="for all of it")
    options = command_line.parse_args(arguments)
    end = time.monotonic() + options.seconds
    ended = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "edgevlm").symlink_to(ROOT, target_is_directory=True)
        for module, words in PARTS:
            print(f"== {module}", flush=True)
            ended[module] = run(module, words, place, max(end - time.monotonic(), 1.0))
    for module, how in ended.items():
        print(f"{module}: {how}")
    return 0 if all(how == "ok" for how in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
