"""SAM's image encoder and mask decoder against the installed transformers, in several sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.toolkit.checkpoints.layouts import sam as layout
from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.vlm import components
from tests.systems import segmenting

SIZES: dict[str, dict[str, Any]] = {
    "windows with padding": {},
    "windows that fit": {"image": 64, "window": 4, "layers": 3, "global_blocks": (0, 2)},
    "a window larger than the map": {"image": 24, "window": 5},
    "every block over the map": {"layers": 1, "global_blocks": (0,)},
    "windows alone": {"global_blocks": (), "window": 5},
    "other widths": {"hidden_size": 32, "heads": 4, "width": 64, "mlp": 96, "patch": 16,
                     "image": 112, "window": 3},
}  # fmt: skip
HIDDEN = 20


class InMemory:
    """Tensors as a checkpoint reads them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> Any:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def read(self, key: str) -> Array:
        return self._tensors[key].numpy()


def stored(model: Any, projection: torch.nn.Sequential) -> Checkpoint:
    """What MLCD-Seg's checkpoint holds of SAM."""
    tensors = {f"model.sam.{k}": t for k, t in segmenting.original_names(model).items()}
    for key, tensor in projection.state_dict().items():
        tensors[f"model.text2sam_projection.{key}"] = tensor
    source = InMemory(tensors)
    return Checkpoint(dict.fromkeys(tensors, source), "memory")


@pytest.mark.parametrize("name", SIZES)
def test_features_and_masks_equal_transformers(name: str) -> None:
    model = segmenting.sam(**SIZES[name])
    width = model.config.vision_config.output_channels
    projection = segmenting.projection(HIDDEN, width)
    masks = layout.read(stored(model, projection), HIDDEN)
    c = masks.config.encoder.config
    own = model.config.vision_config
    assert (c.image_size, c.num_heads, c.window) == (
        own.image_size, own.num_attention_heads,
        own.window_size if len(own.global_attn_indexes) < c.num_layers else c.grid,
    )  # fmt: skip
    assert c.global_blocks == tuple(own.global_attn_indexes)

    generator = np.random.default_rng(3)
    pixels = generator.normal(0, 1, (2, 3, *c.pixels)).astype(np.float32)
    part = components.encoder_component(masks.config.encoder)
    weights = dict(masks.tensors["segmenter.encoder"].weights())
    assert {k: v.shape for k, v in weights.items()} == dict(part.shapes)
    found = part.forward(NumpyOps(), Weights(weights), {"pixels": pixels})["features.0"]
    with torch.no_grad():
        expected = model.vision_encoder(torch.from_numpy(pixels)).last_hidden_state
    flat = expected.flatten(2).transpose(1, 2).numpy()
    assert np.abs(found - flat).max() < 1e-4 * max(1.0, np.abs(flat).max())

    states = generator.normal(0, 1, (3, HIDDEN)).astype(np.float32)
    decoder = components.mask_component(masks.config)
    weights = dict(masks.tensors["segmenter.decoder"].weights())
    assert {k: v.shape for k, v in weights.items()} == dict(decoder.shapes)
    inputs = {"hidden": states, "features": np.repeat(flat[:1], 3, 0)}
    found = decoder.forward(NumpyOps(), Weights(weights), inputs)["masks"]
    with torch.no_grad():
        prompts = projection(torch.from_numpy(states))
    wanted = segmenting.masks_of(model, prompts, expected[:1]).numpy()
    assert np.abs(found - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())


def changed(**tensors: torch.Tensor | None) -> Checkpoint:
    """The checkpoint with other tensors below model.sam., or without them."""
    projection = segmenting.projection(HIDDEN, 32)
    whole = stored(segmenting.sam(), projection)
    found = {key: torch.from_numpy(whole.read(key)) for key in whole.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        found.pop(f"model.{key}", None)
        found |= {} if tensor is None else {f"model.{key}": tensor}
    return Checkpoint(dict.fromkeys(found, InMemory(found)), "memory")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"sam__image_encoder__pos_embed": None}, "lacks model.sam.image_encoder.pos_embed"),
        ({"sam__image_encoder__pos_embed": torch.zeros(6, 6, 24)}, "expected 4 axes"),
        ({"text2sam_projection__0__weight": torch.zeros(32, 9)}, "have 20 and 9 channels"),
        ({"sam__image_encoder__neck__0__weight": torch.zeros(40, 24, 1, 1)}, "have 40 and 32"),
        ({"sam__image_encoder__blocks__0__attn__rel_pos_h": torch.zeros(7, 5)}, "heads of [5, 8]"),
        (
            {"sam__mask_decoder__transformer__layers__0__cross_attn_token_to_image__q_proj__weight":
             torch.zeros(12, 32)},
            "attention over 12 channels",
        ),
    ],
)  # fmt: skip
def test_a_sam_that_does_not_fit_is_refused(
    tensors: dict[str, torch.Tensor | None], reason: str
) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        layout.read(changed(**tensors), HIDDEN)
    assert reason in caught.value.message
