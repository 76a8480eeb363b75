"""Architectures, one file each, found by file name: encoders/clip.py is the encoder "clip".

Every file offers `Config` (with `read`), `forward`, `shapes`, `names`, `unused` and `tiny`; an
encoder that can be a model by itself also `POOLINGS` and `embed`, with its own shapes and names; a
language model's forward pass is in two parts, `hidden` and `logits`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.recipes import Recipe
from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights

Role = Literal["encoders", "mergers", "lms", "segmenters"]


class Architecture(Protocol):
    """What every architecture file offers, whatever its role."""

    Config: Any

    def shapes(self, c: Any) -> dict[str, tuple[int, ...]]: ...

    def names(self, c: Any) -> Mapping[str, Recipe]: ...

    def unused(self, c: Any) -> tuple[str, ...]: ...

    def tiny(self) -> Any: ...


class EncoderFile(Architecture, Protocol):
    """An encoder: its Config has `pixels`, `tokens` and `hidden_sizes`.

    MODEL_TYPES are the model_type values of the tower configurations that it reads.
    """

    MODEL_TYPES: tuple[str, ...]

    def forward(self, op: Ops[T], c: Any, w: Weights[T], pixels: T) -> tuple[T, ...]: ...


class TowerFile(EncoderFile, Protocol):
    """An encoder that gives one embedding an image, by one of POOLINGS; the first is the usual."""

    POOLINGS: tuple[str, ...]

    def embed(self, op: Ops[T], c: Any, w: Weights[T], pixels: T, pooling: str) -> T: ...

    def embed_shapes(self, c: Any, pooling: str) -> dict[str, tuple[int, ...]]: ...

    def embed_names(self, c: Any, pooling: str) -> Mapping[str, Recipe]: ...

    def embed_unused(self, c: Any, pooling: str) -> tuple[str, ...]: ...


class MergerFile(Architecture, Protocol):
    """A merger: its Config has `outputs`."""

    def forward(self, op: Ops[T], c: Any, w: Weights[T], features: Sequence[T]) -> T: ...


class LMFile(Architecture, Protocol):
    """A language model: its Config has the fields of lms/llama.py."""

    def hidden(
        self,
        op: Ops[T],
        c: Any,
        w: Weights[T],
        inputs: Mapping[str, T],
        past: Sequence[tuple[T, T]],
    ) -> tuple[T, list[tuple[T, T]]]: ...

    def logits(self, op: Ops[T], c: Any, w: Weights[T], x: T) -> T: ...


class SegmenterFile(Architecture, Protocol):
    """What makes masks of an answer: its Config has `hidden_size`, `tokens`, `width`, `side`."""

    def forward(self, op: Ops[T], c: Any, w: Weights[T], hidden: T, features: T) -> T: ...


def kinds(role: Role) -> list[str]:
    """Names of the architecture files of a role."""
    folder = Path(__file__).parent / role
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]))


def _find(role: Role, kind: str) -> Any:
    if kind not in kinds(role):
        known = ", ".join(kinds(role))
        raise ConfigError(f"there is no {role[:-1]} called {kind!r}", hint=f"known: {known}")
    return import_module(f"edgevlm.toolkit.models.{role}.{kind}")


def encoder(kind: str) -> EncoderFile:
    """The encoder file called `kind`. Raises ConfigError naming the known ones."""
    return cast(EncoderFile, _find("encoders", kind))


def towers() -> list[str]:
    """Names of the encoder files that can be a model by themselves."""
    return [kind for kind in kinds("encoders") if hasattr(_find("encoders", kind), "POOLINGS")]


def tower(kind: str) -> TowerFile:
    """The same of an encoder that can be a model by itself. Raises ConfigError for any other."""
    if kind not in towers():
        raise ConfigError(
            f"{kind} gives no embedding by itself", hint=f"known: {', '.join(towers())}"
        )
    return cast(TowerFile, _find("encoders", kind))


def merger(kind: str) -> MergerFile:
    """The merger file called `kind`."""
    return cast(MergerFile, _find("mergers", kind))


def lm(kind: str) -> LMFile:
    """The language-model file called `kind`."""
    return cast(LMFile, _find("lms", kind))


def segmenter(kind: str) -> SegmenterFile:
    """The segmenter file called `kind`."""
    return cast(SegmenterFile, _find("segmenters", kind))
