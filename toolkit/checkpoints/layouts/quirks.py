"""Quirks: behaviour of the original programs that loses data. Left out, unless chosen by name.

docs/systems.md states for each what the original does and what happens here without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgevlm.toolkit.checkpoints.layouts.source import Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array

_ORIGINALS = ("convllava", "llava", "llava_next", "mlcd", "mlcd_seg", "mmfuser")


@dataclass(frozen=True)
class Quirk:
    """One quirk: the systems whose original has it, and the function that adds it to a source.

    `keep` takes the source and the checkpoint's config.json.
    """

    systems: tuple[str, ...]
    keep: Callable[[Source, Mapping[str, Any]], Source]


def keep(source: Source, config: Mapping[str, Any], names: Sequence[str]) -> Source:
    """The source with the quirks in `names`. Raises ConfigError for one that its original lacks."""
    for name in names:
        if name not in QUIRKS:
            raise ConfigError(f"there is no quirk {name!r}", hint=f"known: {', '.join(QUIRKS)}")
        if source.model.system not in QUIRKS[name].systems:
            raise ConfigError(
                f"the original of {source.model.system} has no quirk {name!r}",
                hint=f"it is one of: {', '.join(QUIRKS[name].systems)}",
            )
        source = QUIRKS[name].keep(source, config)
    applied = {"quirks": [*source.origin.get("quirks", ()), *names]} if names else {}
    return replace(source, origin={**source.origin, **applied})


def _ignore_exif(source: Source, config: Mapping[str, Any]) -> Source:
    """EXIF orientation is ignored: photographs stay as the camera stored them."""
    model = source.model
    return replace(source, model=replace(model, images=replace(model.images, upright=False)))


def _cut_prompt(source: Source, config: Mapping[str, Any]) -> Source:
    """Prompts end after tokenizer_model_max_length positions."""
    limit = config.get("tokenizer_model_max_length")
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(
            f"quirk 'cut-prompt' needs tokenizer_model_max_length, config.json has {limit!r}",
            hint="without that key the original cuts nothing: leave the quirk out",
        )
    return _prompts(source, cut=limit)


def _reuse_image(source: Source, config: Mapping[str, Any]) -> Source:
    """One placeholder more than images shows the last image again."""
    return _prompts(source, reuse_last=True)


def _one_mask_size(source: Source, config: Mapping[str, Any]) -> Source:
    """The masks of several images all have the height and width of the largest one."""
    model = source.model
    assert model.segmenter is not None
    return replace(source, model=replace(model, segmenter=replace(model.segmenter, one_size=True)))


def _prompts(source: Source, **changes: Any) -> Source:
    model = source.model
    return replace(source, model=replace(model, prompts=replace(model.prompts, **changes)))


class _Zeroed(Mapping[str, Array]):
    """A component's tensors, some of them zeros."""

    def __init__(self, tensors: Mapping[str, Array], zeros: frozenset[str]) -> None:
        self._tensors = tensors
        self._zeros = zeros

    def __getitem__(self, key: str) -> Array:
        tensor = self._tensors[key]
        return np.zeros_like(tensor) if key in self._zeros else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _renamed_gamma(source: Source, config: Mapping[str, Any]) -> Source:
    """The fuser's gammas are zero: the transformers of that time renames and never loads them."""
    merger = _Zeroed(source.weights["merger"], frozenset({"fuser.gamma1", "fuser.gamma2"}))
    return replace(source, weights={**source.weights, "merger": merger})


QUIRKS: Mapping[str, Quirk] = {
    "cut-prompt": Quirk(_ORIGINALS, _cut_prompt),
    "ignore-exif": Quirk(_ORIGINALS, _ignore_exif),
    "one-mask-size": Quirk(("mlcd_seg",), _one_mask_size),
    "renamed-gamma": Quirk(("mmfuser",), _renamed_gamma),
    "reuse-image": Quirk(("llava_next", "mlcd", "mlcd_seg"), _reuse_image),
}
