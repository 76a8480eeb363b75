"""Goldens: small inputs and the reference's outputs, made at export, replayed at every build.

A quantized bundle has two answers to each call: its own, of the weights as they are stored, and the
float model's. The first says whether kernels are right, the second what the precision costs.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgevlm.toolkit.bundle.manifest import Tensors
from edgevlm.toolkit.errors import AccuracyError, BundleError
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.quantization.channels import RoundRows
from edgevlm.toolkit.quantization.static import RoundInputs
from edgevlm.toolkit.vlm.components import GOLDEN_TOKENS, Component, Port, zero_states

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
    "masks": 1,
}
_KINDS = ("in", "out", "float")  # in the names of the arrays of golden.npz
_MOST_BYTES = 1 << 30
_KEEP = 1 << 16  # outputs larger than this are stored as that many evenly spaced values


@dataclass(frozen=True)
class Golden:
    """One call of one component: inputs without states, and the expected outputs.

    outputs: of the weights as this bundle stores them. float_outputs: of the float model that a
    quantized bundle was made from; empty where the two are the same. Calls of a component are
    replayed in order: the second sees the states that the first left. Outputs are flat; one of
    more than 65,536 values is sampled at `sample(size)`.
    """

    component: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    float_outputs: dict[str, Array] = field(default_factory=dict)


def sample(size: int) -> Array:
    """Indices into a flattened output at which it is compared."""
    if size <= _KEEP:
        return np.arange(size)
    return np.linspace(0, size - 1, _KEEP).astype(np.int64)


def sampled(output: Array) -> Array:
    """The values of an output at which it is compared, as a copy in float32."""
    return output.reshape(-1)[sample(output.size)].astype(np.float32)


def centered(values: Array, shape: tuple[int, ...]) -> Array:
    """`sampled` values of an output of `shape`, each less the mean of its row (the last axis).

    What logits say stays the same if a constant is added to a row: a difference must not count it,
    nor may a large constant hide one.
    """
    rows = sample(int(np.prod(shape))) // shape[-1]
    means = np.bincount(rows, values) / np.maximum(np.bincount(rows), 1)
    return np.asarray(values - means[rows])


def relative_difference(actual: Array, expected: Array) -> float:
    """Largest absolute difference over the largest expected value; infinite for NaN."""
    if not _comparable(actual, expected):
        return float("inf")
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def relative_rms(pairs: Iterable[tuple[Array, Array]]) -> float:
    """Root of the mean squared difference of all (actual, expected), over that of the expected
    values; infinite for NaN.
    """
    error = magnitude = 0.0
    for actual, expected in pairs:
        if not _comparable(actual, expected):
            return float("inf")
        error += float(np.sum((actual - expected).astype(np.float64) ** 2))
        magnitude += float(np.sum(expected.astype(np.float64) ** 2))
    return float(np.sqrt(error / max(magnitude, 1e-24)))


def _comparable(actual: Array, expected: Array) -> bool:
    """Whether both have one shape, and all are numbers: NaN would vanish in a maximum."""
    return actual.shape == expected.shape and bool(
        np.isfinite(actual).all() and np.isfinite(expected).all()
    )


def make_goldens(
    component: Component, tensors: Mapping[str, Array], seed: int = 0
) -> Iterator[Golden]:
    """Run the reference over a component's golden calls, with weights read one at a time."""
    return _answered(component, tensors, _calls(component, seed))


def requantized(
    component: Component, tensors: Mapping[str, Array], origin: Iterable[Golden]
) -> Iterator[Golden]:
    """The goldens of a component in other weights; the float answers stay those of `origin`."""
    calls = list(origin)
    answers = _answered(component, tensors, (golden.inputs for golden in calls))
    for golden, answer in zip(calls, answers, strict=True):
        yield replace(answer, float_outputs=golden.float_outputs or golden.outputs)


def reference(component: str, tensors: Mapping[str, Array]) -> Ops[Array]:
    """The reference for weights of a file: where their storage says so, inputs are rounded too."""
    ops: Any = NumpyOps()
    if isinstance(tensors, Tensors) and tensors.by_channel:
        ops = RoundRows(ops, component, tensors.by_channel)
    if isinstance(tensors, Tensors) and tensors.input_steps:
        ops = RoundInputs(ops, component, tensors.input_steps)
    return cast(Ops[Array], ops)


def _answered(
    component: Component, tensors: Mapping[str, Array], calls: Iterable[dict[str, Array]]
) -> Iterator[Golden]:
    states = zero_states(component.inputs, component.outputs, AXES)
    ops = reference(component.name, tensors)
    for inputs in calls:
        outputs = component.forward(ops, Weights(tensors), {**inputs, **states})
        states = {p.updates: outputs[p.name] for p in component.outputs if p.updates}
        plain = [p.name for p in component.outputs if p.updates is None]
        answer = {n: sampled(outputs[n]) for n in plain}
        _check_numbers(component.name, answer)
        yield Golden(component.name, inputs, answer)


def _check_numbers(component: str, answer: Mapping[str, Array]) -> None:
    """Raise AccuracyError for an answer that nothing can be compared with."""
    for name, values in answer.items():
        if not np.isfinite(values).all():
            raise AccuracyError(
                f"the reference's own {name} of {component} are NaN or infinite",
                hint="the weights are damaged, or too large for this --dtype",
            )


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
            "score": np.arange(length - 1, -1, -1)[None],  # every position, and not in order
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
        every = (golden.inputs, golden.outputs, golden.float_outputs)
        for kind, arrays in zip(_KINDS, every, strict=True):
            for name, array in arrays.items():
                flat[f"{number:02d}|{golden.component}|{kind}|{name}"] = array
    with path.open("wb") as file:
        np.savez_compressed(file, **flat)  # type: ignore[arg-type]


def load(path: Path) -> list[Golden]:
    """The inverse of save. Raises BundleError for a file that save did not write, or no numbers."""
    goldens: dict[str, Golden] = {}
    try:
        _refuse_large(path)
        with np.load(path) as stored:
            for key in sorted(stored.files):
                number, component, kind, name = key.split("|")
                golden = goldens.setdefault(number, Golden(component, {}, {}))
                every = (golden.inputs, golden.outputs, golden.float_outputs)
                every[_KINDS.index(kind)][name] = _numbers(stored[key])
    except Exception as odd:  # NumPy, zipfile and what they use raise many types
        raise BundleError(
            f"{path} holds no goldens: {odd}", hint="export the bundle again"
        ) from None
    return list(goldens.values())


def _numbers(array: Array) -> Array:
    if array.dtype.kind not in "fi" or not np.isfinite(array).all():
        raise ValueError("a value is NaN or infinite, or no number at all")
    return array


def _refuse_large(path: Path) -> None:
    """Raise ValueError for what would unpack to more than goldens ever are."""
    with zipfile.ZipFile(path) as packed:
        size = sum(item.file_size for item in packed.infolist())
    if size > _MOST_BYTES:
        raise ValueError(f"{size} bytes when they are unpacked")


def calls_of(
    goldens: Iterable[Golden], name: str, inputs: Sequence[Port], outputs: Sequence[Port]
) -> list[Golden]:
    """The calls of the component `name`. Raises BundleError if they do not fit its ports."""
    states = {port.updates for port in outputs if port.updates}
    given = {port.name: port for port in inputs if port.name not in states}
    answered = {port.name for port in outputs if not port.updates}
    calls = [golden for golden in goldens if golden.component == name]
    fit = [
        golden.inputs.keys() == given.keys()
        and all(_fits(port, golden.inputs[key]) for key, port in given.items())
        and golden.outputs.keys() == answered
        and golden.float_outputs.keys() in (set(), answered)
        for golden in calls
    ]
    if not calls or not all(fit):
        raise BundleError(
            f"the goldens of {name} do not fit its ports", hint="export the bundle again"
        )
    return calls


def _fits(port: Port, array: Array) -> bool:
    kind = "i" if port.dtype == "int64" else "f"
    if array.dtype.kind != kind or array.ndim != len(port.shape):
        return False
    fixed = zip(port.shape, array.shape, strict=True)
    return all(isinstance(n, str) or n == size for n, size in fixed)
