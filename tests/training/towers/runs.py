"""Small sets of images, small towers, and the command line that trains them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edgevlm.toolkit.models.encoders import clip, unicom
from edgevlm.training.towers.files import published, save_tower
from edgevlm.training.towers.tower import Tower

CLASSES = 4
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (190, 190, 40))
CLIP = clip.Config(32, 2, 4, 64, 7, 28)
UNICOM = unicom.Config(64, 2, 1, 7, 28, 24)


def folder(root: Path, each: int = 8, seed: int = 0, flat: bool = False) -> Path:
    """Noisy pictures of one colour each, a sub-folder for each colour unless flat."""
    draws = np.random.default_rng(seed)
    for number in range(CLASSES * each):
        kind = number % CLASSES
        home = root if flat else root / f"colour-{kind}"
        home.mkdir(parents=True, exist_ok=True)
        pixels = draws.normal(COLOURS[kind], 25, (32, 36, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(home / f"{number:03d}.png")
    return root


def clip_tower(out: Path) -> Path:
    """The folder of a CLIP tower."""
    save_tower(Tower("clip", CLIP, seed=3), out)
    return out


def unicom_file(out: Path) -> Path:
    """A .pt file in the names of UNICOM's; its heads stand in a config.json beside it."""
    torch.save(published(Tower("unicom", UNICOM, seed=3)), out)
    described = {"model_type": "unicom", **asdict(UNICOM)}
    out.with_name("config.json").write_text(json.dumps(described))
    return out


def arguments(stage: str, model: Path, data: Path, out: Path, *more: str) -> list[str]:
    """Of `edgevlm train`, for a quick run on images of 28 pixels."""
    words = ["train", stage, "--model", str(model), "--data", str(data), "-o", str(out)]
    words += ["--image-size", "28", "--batch", "8", "--rate", "1e-3", "--log-every", "1"]
    return [*words, *more]


def flags(options: Mapping[str, object]) -> list[str]:
    """Options as the command line states them."""
    return [w for key, v in options.items() for w in ("--" + key.replace("_", "-"), str(v))]


def lines(out: Path, kind: str = "step") -> list[dict[str, float]]:
    """The lines of a kind in metrics.jsonl."""
    read = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in read if line["kind"] == kind]
