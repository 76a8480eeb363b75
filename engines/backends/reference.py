"""The reference backend: the reference itself behind the interface of an engine. Slow and exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgevlm.engines.backends import Compiled, LayerTime, Peaks, RunnerOptions, Shapes
from edgevlm.engines.backends.common import best_seconds, place
from edgevlm.engines.backends.state import State, check, zeros
from edgevlm.toolkit.bundle.goldens import reference
from edgevlm.toolkit.bundle.manifest import ComponentRecord, Tensors
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.target import Target, machine
from edgevlm.toolkit.vlm import components, towers


def here() -> Target:
    """NumPy on this machine."""
    return Target("reference", (), machine())


def check_builds(target: Target) -> bool:
    """Never: what is compiled is compared with the reference at once."""
    return False


def compile(
    source: Path,
    dtype: str,
    record: ComponentRecord,
    folder: Path,
    target: Target,
    shapes: Shapes,
) -> Compiled:
    """Copy the weights; there is no graph to compile."""
    place(source / record.weights, folder / record.weights)
    return Compiled(record, (record.weights,))


def without_logits(folder: Path, record: ComponentRecord) -> ComponentRecord:
    """As it is: there is no graph to cut."""
    return record


def extras(folder: Path) -> tuple[str, ...]:
    """No files."""
    return ()


def open(
    folder: Path, record: ComponentRecord, model: Mapping[str, object], options: RunnerOptions
) -> ReferenceRunner:
    """The component's function over NumPy."""
    config = towers.from_json(dict(model), "engine.json: model")
    component = next(c for c in components.components(config) if c.name == record.name)
    tensors = Tensors(folder / record.weights)
    return ReferenceRunner(component, dict(tensors), options, reference(record.name, tensors))


def peaks(folder: Path) -> Peaks:
    """NumPy's matrix product, where 8-bit weights are converted to float first, and its sum."""
    a = np.ones((1024, 1024), np.float32)
    long = np.ones(1 << 25, np.float32)
    product = best_seconds(lambda: a @ a)
    rate = 2 * 1024**3 / product / 1e9
    return Peaks(rate, rate, long.nbytes / best_seconds(long.sum) / 1e9)


class ReferenceRunner:
    """A component run by the reference's `ops`, weights in memory as float32."""

    def __init__(
        self,
        component: components.Component,
        tensors: dict[str, Array],
        options: RunnerOptions,
        ops: Ops[Array],
    ) -> None:
        self._ops = ops
        self._component = component
        self._weights = Weights(tensors)
        self._context = options.context
        self._updates = {port.name: port.updates for port in component.outputs if port.updates}

    def new_state(self, slots: int = 1) -> State:
        return zeros(
            self._component.inputs, self._component.outputs, context=self._context, slots=slots
        )

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        states: Mapping[str, Array] = {}
        if self._updates:
            batch, names = len(inputs["start"]), list(self._updates.values())
            states = check(state, names, batch, self._component.name).arrays
        outputs = self._component.forward(self._ops, self._weights, {**inputs, **states})
        for output, name in self._updates.items():
            np.copyto(states[name], outputs.pop(output))
        return outputs

    def layers(self) -> list[LayerTime]:
        return []

    def close(self) -> None:
        self._weights = Weights({})
