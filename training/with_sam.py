"""The model that MLCD-Seg's training begins with: an MLCD model, SAM from its own file, [SEG].

As in deepglint/unicom (mlcd_vl/downstream): the checkpoint of MLCD-Embodied, sam_vit_h_4b8939.pth,
a new projection between them, and one more token, whose rows are drawn as transformers draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgevlm.toolkit.checkpoints.layouts import sam
from edgevlm.toolkit.checkpoints.layouts.source import Source, check
from edgevlm.toolkit.checkpoints.layouts.tokenizer_files import add_tokens
from edgevlm.toolkit.checkpoints.weights import Checkpoint, TensorSource, open_file
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.training import torch_files

SYSTEM = "mlcd_seg"
_ROW_STD = 0.02  # initializer_range of Qwen2
_TILES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1))


def begun(source: Source, file: str | None, seed: int) -> Source:
    """`source` with SAM behind it; as it is without a file. file: safetensors or torch's.

    Raises ConfigError for a model that has SAM, or is none of MLCD with a CLIP-class tower, and
    CheckpointError for a file that is not SAM's.
    """
    if file is None:
        return source
    _check(source.model)
    hidden_size = int(source.model.lm.config.hidden_size)
    stored = _checkpoint(Path(file), hidden_size, seed)
    masks = sam.read(stored, hidden_size)
    check(masks.tensors.values(), masks.unused)
    text, token = _with_token(source)
    lm = source.model.lm
    grown = replace(lm, config=replace(lm.config, vocab_size=token + 1))
    rows = np.random.default_rng(seed).normal(0, _ROW_STD, (2, hidden_size)).astype(np.float32)
    model = replace(
        source.model,
        system=SYSTEM,
        lm=grown,
        images=_tiled(source.model.images),
        segmenter=masks.config,
    )
    weights = {
        **source.weights,
        lm.name: _Grown(source.weights[lm.name], {"embed.weight": rows[0], "head.weight": rows[1]}),
        **{name: tensors.weights() for name, tensors in masks.tensors.items()},
    }
    origin = {**source.origin, "sam": str(file)}
    return replace(source, model=model, weights=weights, tokenizer=text, origin=origin)


def _check(model: ModelConfig) -> None:
    kinds = [encoder.kind for encoder in model.encoders]
    if model.segmenter is not None:
        raise ConfigError(f"{model.name} has SAM already", hint="leave --sam out")
    if model.system != "mlcd" or kinds != ["clip"]:
        raise ConfigError(
            f"--sam: {model.name} is of {model.system} with {', '.join(kinds)}, expected mlcd with "
            "a CLIP-class tower",
            hint="MLCD-Seg begins with MLCD-Embodied",
        )


def _tiled(images: ImageRules) -> ImageRules:
    """The grids of tiles of the published training."""
    if images.tiling is None:
        return images
    side = images.tiling.tile
    points = tuple((side * w, side * h) for w, h in _TILES)
    return replace(images, tiling=replace(images.tiling, pinpoints=points))


def _with_token(source: Source) -> tuple[str, int]:
    """The tokenizer with [SEG] as its last token, and the token's id."""
    rows = int(source.model.lm.config.vocab_size)
    text = sam.with_token(add_tokens(source.tokenizer, [sam.TOKEN]))
    number = Tokenizer.from_text(text).id_of(sam.TOKEN)
    if number != rows:
        raise ConfigError(
            f"{sam.TOKEN} would be token {number} of a model with {rows} rows",
            hint="the model's rows and its tokenizer have to be of one length",
        )
    return text, rows


class _Grown(Mapping[str, Array]):
    """The language model's tensors with one more row of its vocabulary."""

    def __init__(self, tensors: Mapping[str, Array], rows: Mapping[str, Array]) -> None:
        self._tensors = tensors
        self._rows = rows

    def __getitem__(self, key: str) -> Array:
        tensor = self._tensors[key]
        row = self._rows.get(key)
        if row is None:
            return tensor
        own = row.astype(tensor.dtype)
        if key == "head.weight":
            return np.concatenate([tensor, own[:, None]], 1)
        return np.concatenate([tensor, own[None]], 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Below:
    """The tensors of a source under a prefix."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source, self._prefix = source, prefix

    def keys(self) -> list[str]:
        return [self._prefix + key for key in self._source.keys()]  # noqa: SIM118

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(key.removeprefix(self._prefix))

    def read(self, key: str) -> Array:
        return self._source.read(key.removeprefix(self._prefix))


class _Drawn:
    """The projection, drawn as torch draws linears: uniform within 1 / sqrt(inputs)."""

    def __init__(self, hidden_size: int, width: int, seed: int) -> None:
        generator = np.random.default_rng([seed, 1])
        self._tensors: dict[str, Array] = {}
        for number, inputs in ((0, hidden_size), (2, width)):
            limit = 1 / math.sqrt(inputs)
            for leaf, shape in (("weight", (width, inputs)), ("bias", (width,))):
                values = generator.uniform(-limit, limit, shape).astype(np.float32)
                self._tensors[f"model.text2sam_projection.{number}.{leaf}"] = values

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def read(self, key: str) -> Array:
        return self._tensors[key]


def _checkpoint(file: Path, hidden_size: int, seed: int) -> Checkpoint:
    """SAM's tensors and the projection's under the names that MLCD-Seg's checkpoints have."""
    stored = _Below(open_file(file, torch_files.reader()), "model.sam.")
    width = sam.width_of(Checkpoint(dict.fromkeys(stored.keys(), stored), str(file)))
    drawn = _Drawn(hidden_size, width, seed)
    sources: dict[str, TensorSource] = dict.fromkeys(stored.keys(), stored)
    sources |= dict.fromkeys(drawn.keys(), drawn)
    return Checkpoint(sources, str(file))
