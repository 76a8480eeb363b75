"""Golden checkpoints and small pieces that the tests of the data side share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.training.data.masking import Runs
from tests.conftest import golden_case

MLCD = "mlcd_llavanext_e2e"
LLAVA = ("e2e_llava15", "e2e_convllava", "e2e_mmfuser")


@dataclass(frozen=True)
class Golden:
    """A golden folder with its model; case: case.json or meta.json."""

    folder: Path
    case: dict[str, Any]
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    model: ModelConfig
    tokenizer: Tokenizer


@lru_cache(maxsize=4)
def golden(name: str) -> Golden:
    """A golden case by name."""
    folder = golden_case(name)
    stated = next(file for file in (folder / "case.json", folder / "meta.json") if file.exists())
    case = json.loads(stated.read_text())
    source = systems.load(folder / case.get("checkpoint", "."), Options())
    tokenizer = Tokenizer.from_text(
        source.tokenizer, source.model.prompts.sentencepiece, source.model.lm.config.vocab_size
    )
    inputs, outputs = (dict(np.load(folder / f"{n}.npz")) for n in ("inputs", "outputs"))
    return Golden(folder, case, inputs, outputs, source.model, tokenizer)


def flat(runs: Runs, image: int) -> list[int]:
    """Runs joined, each image as one number, as the originals have them before splicing."""
    joined = list(runs[0])
    for run in runs[1:]:
        joined += [image, *run]
    return joined
