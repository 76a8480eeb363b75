"""A small data set, and training runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.conftest import ROOT, golden_case

COLOURS = ("red", "green", "blue")
STAGE = "llava-finetune"


def checkpoint() -> Path:
    """The golden LLaVA-1.5."""
    return golden_case("e2e_llava15") / "llava-v1.5-tiny"


def item(number: int) -> dict[str, Any]:
    """A question about a picture, or now and then one of text alone."""
    answer = {"from": "gpt", "value": COLOURS[number % 3]}
    if number % 7 == 6:
        question = {"from": "human", "value": f"Name colour {number % 3}."}
        return {"id": number, "conversations": [question, answer]}
    question = {"from": "human", "value": "<image>\nWhat is it?"}
    return {"id": number, "image": f"{number}.png", "conversations": [question, answer]}


def data_set(folder: Path, size: int = 24) -> Path:
    """LLaVA's JSON with pictures of one colour each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(size):
        pixels = np.zeros((20, 20, 3), np.uint8)
        pixels[..., number % 3] = 120 + 5 * (number % 20)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    path = folder / "train.json"
    path.write_text(json.dumps([item(number) for number in range(size)]))
    return path


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    """Of `edgevlm train`, for a quick run."""
    return [
        "train",
        STAGE,
        "--model",
        str(checkpoint()),
        "--data",
        str(data),
        "-o",
        str(out),
        *("--batch", "8", "--micro-batch", "2", "--rate", "1e-3", "--log-every", "1"),
        *more,
    ]


def start(*words: str, processes: int = 1, env: dict[str, str] | None = None) -> Any:
    """The command line as a running process; under torchrun if there are several."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher += [str(processes)]
    return _started([*launcher, str(ROOT / "cli.py"), *words], env or {})


def _started(command: list[str], env: dict[str, str]) -> Any:
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet, **env},
    )


# The command line, killed in the middle of writing a state; before its words stands which one.
_KILLED = """
import os, signal, sys
from edgevlm import cli
from edgevlm.training import states
step, files = sys.argv.pop(1), states._files
def killing(folder):
    if folder.name == f".{step}.partial":
        os.kill(os.getpid(), signal.SIGKILL)
    return files(folder)
states._files = killing
cli.main()
"""


def kill(step: int, *words: str) -> None:
    """Run the command line, which is killed while it writes the state of a step."""
    process = _started([sys.executable, "-c", _KILLED, f"step-{step:06}", *words], {})
    _, err = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, err[-3000:]


def finish(process: Any) -> str:
    """What a run printed; its failure is the test's."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return str(out)


def losses(out: Path) -> list[float]:
    """The loss of every step of a run."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]
