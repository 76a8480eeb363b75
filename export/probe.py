"""Components outside of any model, for measuring: linears alone, which tell what number format runs
fastest on a machine, and whatever a measurement needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.export.write import describe, record, write_graph
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.checkpoints.weights import RandomWeights
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.toolkit.vlm.components import Component, Port

_SHARE_AN_INPUT = 2  # as gate and up do; q, k and v are three, and other linears alone


def linears(
    folder: Path, inputs: int, outputs: int, copies: int, precision: Precision
) -> ComponentRecord:
    """Write `copies` linears [inputs, outputs] in `precision`, with random weights, into `folder`.

    Each has weights of its own, as the layers of a model do, so that none stays in a cache that a
    model's would not stay in. The component's inputs are x.0, x.1 ... [rows, inputs].
    """
    names = [f"linear.{i}" for i in range(copies)]

    def forward(op: Ops[T], w: Weights[T], given: Mapping[str, T]) -> dict[str, T]:
        return {
            f"y.{i}": op.linear(given[f"x.{i // _SHARE_AN_INPUT}"], w / name)
            for i, name in enumerate(names)
        }

    shapes = {f"{name}.weight": (inputs, outputs) for name in names}
    component = Component(
        "probe",
        forward,
        shapes,
        tuple(
            Port(f"x.{i}", "float", ("rows", inputs)) for i in range(-(-copies // _SHARE_AN_INPUT))
        ),
        tuple(Port(f"y.{i}", "float", ("rows", outputs)) for i in range(copies)),
    )
    weights: Mapping[str, Any] = RandomWeights(shapes, 0, component.name)
    return written(folder, component, "fp32", weights, PrecisionPlan(precision))


def written(
    folder: Path,
    component: Component,
    dtype: str,
    weights: Mapping[str, Array],
    plan: PrecisionPlan | None = None,
) -> ComponentRecord:
    """Write any component into `folder`; its weights are stored as `dtype`."""
    recorded = record(component, dtype, plan)
    graph, stored = f"{component.name}.onnx", f"{component.name}.safetensors"
    write_graph(folder, recorded, graph, stored, weights)
    return describe(component, graph, stored)
