"""What demo_exact.py needs: headings, paragraphs, and edgevlm's command line."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(sys.executable).with_name("edgevlm")


def run(*words: object) -> None:
    """Print a command of edgevlm and run it; exit if it fails."""
    _start(words, None)


def output(*words: object) -> str:
    """The same; what the command printed."""
    return _start(words, subprocess.PIPE).stdout.rstrip()


def _start(words: Sequence[object], stdout: int | None) -> subprocess.CompletedProcess[str]:
    print(f"$ {command(*words)}", flush=True)
    program = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, "cli.py"]
    done = subprocess.run([*program, *map(str, words)], cwd=ROOT, stdout=stdout, text=True)
    if done.returncode:
        sys.exit(f"the command failed with exit code {done.returncode}")
    return done


def command(*words: object) -> str:
    """The command as typed in a shell here."""
    name = "python cli.py"
    if INSTALLED.exists():
        name = (
            "edgevlm" if shutil.which("edgevlm") == str(INSTALLED) else os.path.relpath(INSTALLED)
        )
    return f"{name} {shlex.join(map(str, words))}"


def title(number: int, text: str) -> None:
    """A heading."""
    print(f"\n-- {number}. {text} {'-' * max(0, 86 - len(text))}\n", flush=True)


def say(text: str) -> None:
    """A paragraph of explanation."""
    print("\n" + textwrap.fill(text, 92), flush=True)
