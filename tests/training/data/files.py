"""Small data sets on disk, of every kind that is read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.training.data.prepare import SampleRules, rules_for
from tests.training.data.models import golden


def png(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """An image that differs with its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def item(number: int, *, text: bool = False) -> dict[str, Any]:
    """A LLaVA item; its answer has `number` words."""
    question = "What is it?" if text else "<image>\nWhat is it?"
    answer = " ".join(["word"] * number) or "none"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    made: dict[str, Any] = {"id": f"n{number}", "conversations": turns}
    return made if text else {**made, "image": f"{number}.png"}


def write_images(folder: Path, count: int) -> Path:
    """0.png, 1.png, ..."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def write_lines(path: Path, items: list[Any]) -> Path:
    """A file with an item a line; texts are written as they are."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in items]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    """A tar with these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, count: int, each: int) -> list[Path]:
    """Shards of captions; the samples are numbered through."""
    folder.mkdir()
    paths = []
    for shard in range(count):
        files: dict[str, bytes | str] = {}
        for number in range(shard * each, (shard + 1) * each):
            files |= {f"{number:04}.png": png(number), f"{number:04}.txt": f"caption {number}"}
        paths.append(write_tar(folder / f"part-{shard:03}.tar", files))
    return paths


def llava(**options: Any) -> tuple[SampleRules, Tokenizer]:
    """Rules and tokenizer of the tiny LLaVA-1.5."""
    case = golden("e2e_llava15")
    return rules_for(case.model, **options), case.tokenizer
