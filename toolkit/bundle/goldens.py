"""Goldens: small inputs and the reference's outputs, made at export, replayed at every build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.vlm.components import GOLDEN_TOKENS, Component, Port

AXES = {
    "height": 128,
    "width": 192,
    "tokens": 4,
    "placed": 6,
    "tiles": 1,
    "rows": 5,
    "batch": 1,
    "scored": 1,
    "context": 16,
}
_KEEP = 1 << 16  # outputs larger than this are stored as that many evenly spaced values


@dataclass(frozen=True)
class Golden:
    """One call of one component: inputs without states, and the expected outputs.

    Calls of a component are replayed in order: the second sees the states that the first left.
    An output of more than 65,536 values is sampled at `sample(size)`.
    """

    component: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]


def sample(size: int) -> Array:
    """Indices into a flattened output at which it is compared."""
    if size <= _KEEP:
        return np.arange(size)
    return np.linspace(0, size - 1, _KEEP).astype(np.int64)


def make_goldens(
    component: Component, tensors: Mapping[str, Array], seed: int = 0
) -> Iterator[Golden]:
    """Run the reference over a component's golden calls, with weights read one at a time."""
    states = _zero_states(component)
    for inputs in _calls(component, seed):
        outputs = component.forward(NumpyOps(), Weights(tensors), {**inputs, **states})
        states = {p.updates: outputs[p.name] for p in component.outputs if p.updates}
        plain = [p.name for p in component.outputs if p.updates is None]
        kept = {n: outputs[n].reshape(-1)[sample(outputs[n].size)] for n in plain}
        yield Golden(component.name, inputs, {n: x.astype(np.float32) for n, x in kept.items()})


def _zero_states(component: Component) -> dict[str, Array]:
    names = {p.updates for p in component.outputs if p.updates}
    return {
        p.name: np.zeros([_size(n, AXES) for n in p.shape], np.float32)
        for p in component.inputs
        if p.name in names
    }


def _size(dim: int | str, axes: Mapping[str, int]) -> int:
    return axes[dim] if isinstance(dim, str) else dim


def _calls(component: Component, seed: int) -> Iterator[dict[str, Array]]:
    """A decoder gets a prompt in two pieces with image rows, then one token; the rest one call."""
    generator = np.random.default_rng(seed)
    plain = {p.name: p for p in component.inputs}
    if "start" not in plain:
        yield {n: _values(p, AXES, generator) for n, p in plain.items()}
        return
    vocab = component.outputs[0].shape[-1]
    for start, length in ((0, 3), (3, GOLDEN_TOKENS - 4), (GOLDEN_TOKENS - 1, 1)):
        rows = np.full((1, length), -1, np.int64)
        rows[0, 1:4] = [4, 0, 2][: length - 1]
        yield {
            "ids": generator.integers(0, int(vocab), (1, length)),
            "rows": rows,
            "features": _values(plain["features"], AXES, generator),
            "start": np.asarray([start], np.int64),
            "score": np.asarray([[length - 1]], np.int64),
        }


def _values(port: Port, axes: Mapping[str, int], generator: np.random.Generator) -> Array:
    """Eighths between -2 and 2: exact in every float format, and small when compressed."""
    shape = [_size(n, axes) for n in port.shape]
    if port.dtype == "int64":
        return generator.integers(0, axes["rows"], shape)
    return (generator.integers(-16, 17, shape) / 8).astype(np.float32)


def save(path: Path, goldens: list[Golden]) -> None:
    """All calls of all components in one npz."""
    flat = {}
    for number, golden in enumerate(goldens):
        for kind, arrays in (("in", golden.inputs), ("out", golden.outputs)):
            for name, array in arrays.items():
                flat[f"{number:02d}|{golden.component}|{kind}|{name}"] = array
    with path.open("wb") as file:
        np.savez_compressed(file, **flat)  # type: ignore[arg-type]


def load(path: Path) -> list[Golden]:
    """The inverse of save."""
    found: dict[str, Golden] = {}
    with np.load(path) as stored:
        for key in sorted(stored.files):
            number, component, kind, name = key.split("|")
            golden = found.setdefault(number, Golden(component, {}, {}))
            (golden.inputs if kind == "in" else golden.outputs)[name] = stored[key]
    return list(found.values())
