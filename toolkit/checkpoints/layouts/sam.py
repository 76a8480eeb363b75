"""SAM inside a checkpoint (MLCD-Seg): no key of config.json states a size, the tensors do.

What they do not say is that the decoder's attention has eight heads, and how pixels are normalised.
Source: deepglint/unicom, mlcd_vl/downstream, which has it below `model.` with the projection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.layouts.source import ComponentTensors, below
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.checkpoints.shards import INDEX, SINGLE
from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError, ToolkitError
from edgevlm.toolkit.images.longest_side import LongestSide
from edgevlm.toolkit.models.encoders import sam
from edgevlm.toolkit.models.segmenters import sam_decoder
from edgevlm.toolkit.strict import read_json
from edgevlm.toolkit.vlm.components import MASK_DECODER, MASK_ENCODER
from edgevlm.toolkit.vlm.config import ComponentConfig, Segmenter

TOKEN = "[SEG]"
_MODEL, _ENCODER = "model.", "model.sam.image_encoder."
_GAUSSIAN = "model.sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


@dataclass(frozen=True)
class Masks:
    """A checkpoint's segmenter: its configuration, its tensors by component, what is not read."""

    config: Segmenter
    tensors: Mapping[str, ComponentTensors]
    unused: tuple[str, ...]


def segments(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has SAM: config.json names a `sam_path`, or the tensors are there."""
    return bool(config.get("sam_path")) or any(k.startswith(_ENCODER) for k in _stored(folder))


def _stored(folder: Path) -> list[str]:
    """Names of a folder's tensors, as far as safetensors tell them."""
    try:
        if (folder / SINGLE).exists():
            return SafetensorsFile(folder / SINGLE).keys()
        if (folder / INDEX).exists():
            return list(read_json(folder / INDEX).get("weight_map") or ())
    except ToolkitError:  # whoever reads the weights says what is wrong with them
        pass
    return []


def read(checkpoint: Checkpoint, hidden_size: int) -> Masks:
    """The segmenter of a checkpoint whose language model has states of `hidden_size`.

    Raises CheckpointError for tensors that are missing or do not fit one another.
    """
    tensors = _Sizes(checkpoint)
    encoder, decoder = _encoder(tensors), _decoder(tensors)
    _check(checkpoint, encoder, decoder, hidden_size)
    found = {
        MASK_ENCODER: (sam, encoder, _ENCODER),
        MASK_DECODER: (sam_decoder, decoder, _MODEL),
    }
    spare = models.segmenter("sam_decoder").unused(decoder)
    return Masks(
        Segmenter(
            TOKEN,
            ComponentConfig("sam", "sam", encoder),
            ComponentConfig("sam_decoder", "sam_decoder", decoder),
            LongestSide(encoder.image_size),
        ),
        {
            name: ComponentTensors(below(file.names(c), prefix), file.shapes(c), checkpoint)
            for name, (file, c, prefix) in found.items()
        },
        tuple(_MODEL + glob for glob in spare),
    )


def width_of(checkpoint: Checkpoint) -> int:
    """Channels of the prompts of a checkpoint's SAM. Raises CheckpointError if it has none."""
    return 2 * _Sizes(checkpoint).of(_GAUSSIAN, 2)[1]


def with_token(text: str) -> str:
    """The tokenizer.json with the token as text, so that an answer says where its masks belong."""
    data = json.loads(text)
    for token in data.get("added_tokens", []):
        if token["content"] == TOKEN:
            token["special"] = False
    return json.dumps(data, ensure_ascii=False)


class _Sizes:
    """Shapes of a checkpoint's tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def of(self, key: str, axes: int) -> tuple[int, ...]:
        """Of one tensor. Raises CheckpointError if it is missing or has other axes."""
        if key not in self._checkpoint:
            raise CheckpointError(
                f"{self._checkpoint.where} lacks {key}, of whose shape SAM's sizes follow",
                hint="SAM is stored in the checkpoint whole; fetch the checkpoint again",
            )
        shape = self._checkpoint.shape(key)
        if len(shape) != axes:
            raise CheckpointError(
                f"{self._checkpoint.where}: {key} has the shape {shape}, expected {axes} axes"
            )
        return shape

    def layers(self, prefix: str) -> int:
        """How many layers are stored below a prefix, counted from 0."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        matches = (pattern.match(key) for key in self._checkpoint.keys())  # noqa: SIM118
        return 1 + max((int(m[1]) for m in matches if m), default=-1)


def _encoder(tensors: _Sizes) -> sam.Config:
    width, _, patch, _ = tensors.of(f"{_ENCODER}patch_embed.proj.weight", 4)
    grid = tensors.of(f"{_ENCODER}pos_embed", 4)[1]
    depth = tensors.layers(f"{_ENCODER}blocks.")
    tables = [tensors.of(f"{_ENCODER}blocks.{i}.attn.rel_pos_h", 2) for i in range(depth)]
    sides = [(rows + 1) // 2 for rows, _ in tables]
    windows = {side for side in sides if side != grid}
    head_dims = {channels for _, channels in tables}
    if depth == 0 or len(windows) > 1 or len(head_dims) != 1 or width % min(head_dims):
        raise CheckpointError(
            f"SAM's image encoder has {depth} blocks with windows of {sorted(windows)} cells and "
            f"heads of {sorted(head_dims)} channels of {width}; one window and one head are read",
            hint="is this SAM's encoder (ViT-B, L or H)?",
        )
    return sam.Config(
        hidden_size=width,
        num_layers=depth,
        num_heads=width // min(head_dims),
        intermediate_size=tensors.of(f"{_ENCODER}blocks.0.mlp.lin1.weight", 2)[0],
        patch_size=patch,
        image_size=grid * patch,
        window=min(windows, default=grid),
        global_blocks=tuple(i for i, side in enumerate(sides) if side == grid),
        output_size=tensors.of(f"{_ENCODER}neck.0.weight", 4)[0],
    )


def _decoder(tensors: _Sizes) -> sam_decoder.Config:
    decoder = f"{_MODEL}sam.mask_decoder"
    layers = f"{decoder}.transformer.layers"
    projection = tensors.of(f"{_MODEL}text2sam_projection.0.weight", 2)
    grid = tensors.of(f"{_ENCODER}pos_embed", 4)[1]
    hyper = f"{decoder}.output_hypernetworks_mlps.0.layers"
    half, quarter = (tensors.of(f"{decoder}.output_upscaling.{i}.weight", 4)[1] for i in (0, 3))
    return sam_decoder.Config(
        hidden_size=projection[1],
        projection_size=projection[0],
        width=2 * tensors.of(_GAUSSIAN, 2)[1],
        grid=grid,
        num_layers=tensors.layers(f"{layers}."),
        intermediate_size=tensors.of(f"{layers}.0.mlp.lin1.weight", 2)[0],
        inner_size=tensors.of(f"{layers}.0.cross_attn_token_to_image.q_proj.weight", 2)[0],
        up_sizes=(half, quarter),
        hyper_size=tensors.of(f"{hyper}.0.weight", 2)[0],
        num_masks=tensors.of(f"{decoder}.mask_tokens.weight", 2)[0],
    )


def _check(
    checkpoint: Checkpoint, encoder: sam.Config, decoder: sam_decoder.Config, hidden_size: int
) -> None:
    """Raise CheckpointError if the parts do not fit one another."""
    joints = {
        "the language model's states and text2sam_projection": (hidden_size, decoder.hidden_size),
        "SAM's image encoder and its prompt encoder": (encoder.output_size, decoder.width),
    }
    for name, (given, taken) in joints.items():
        if given != taken:
            raise CheckpointError(
                f"{checkpoint.where}: {name} have {given} and {taken} channels",
                hint="the tensors are of several models; fetch the checkpoint again",
            )
    for channels in (decoder.width, decoder.inner_size):
        if channels % decoder.num_heads:
            raise ConfigError(
                f"{checkpoint.where}: SAM's mask decoder has attention over {channels} channels, "
                f"which its {decoder.num_heads} heads do not divide"
            )
