"""What a component costs, from shapes alone: arithmetic, traffic, stored weights and states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from edgevlm.toolkit.ops.costs import Cost, Parameter
from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec, Specs
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.ops.wrappers import Count
from edgevlm.toolkit.quantization.blockwise import TABLE
from edgevlm.toolkit.quantization.plan import TABLES_IN_8_BITS, WEIGHT_BITS, PrecisionPlan
from edgevlm.toolkit.quantization.static import FORMS
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import Component, Port
from edgevlm.toolkit.vlm.towers import Model


def count(component: Component, axes: Mapping[str, int]) -> Count:
    """Run the component over shapes; `axes` gives every dimension that changes between calls."""
    counter = Count(ShapeOps(), component.name)
    parameters = {key: Parameter(shape) for key, shape in component.shapes.items()}
    component.forward(cast(Any, counter), Weights(parameters), inputs(component, axes))
    return counter


def read_bytes(cost: Cost, plan: PrecisionPlan, element_bytes: int) -> float:
    """Bytes of weights that one call of an op reads, stored as `plan` wants them.

    element_bytes: of a weight that the plan leaves in float.
    """
    plain = cost.weight_elements - cost.matrix_elements
    return plain * element_bytes + cost.matrix_elements * _bytes_each(cost, plan, element_bytes)


def weight_bits(cost: Cost, plan: PrecisionPlan) -> int | None:
    """Bits of an element of the op's matrix; None if the plan leaves it in float, or no block
    divides it.
    """
    precision = plan.at(cost.path)
    if _static(cost, plan):
        return 8
    if not cost.matrix_elements or precision not in TABLES_IN_8_BITS:
        return None
    if _by_channel(cost, plan):
        return 8
    if cost.op in ("conv", "layer_merge"):
        return None
    if _block(cost, plan) is None:
        return None
    return WEIGHT_BITS[precision] if cost.op == "linear" else TABLE.bits


def _by_channel(cost: Cost, plan: PrecisionPlan) -> bool:
    """Whether the op's matrix is stored with one scale per output (quantization/channels.py)."""
    return cost.op in ("linear", "layer_merge") and plan.at(cost.path) == "int8_rows"


def _static(cost: Cost, plan: PrecisionPlan) -> bool:
    """Whether the op's matrix is stored with the step of its input (quantization/static.py)."""
    in_codes = cost.matrix_elements > 0 and cost.op in ("linear", "conv")
    return in_codes and plan.at(cost.path) in FORMS


def _block(cost: Cost, plan: PrecisionPlan) -> int | None:
    """The inputs that share a scale in the op's matrix; a table has the usual block."""
    storage = plan.storage_at(cost.path) if cost.op == "linear" else None
    return (storage or TABLE).block_in(cost.matrix_inputs)


def _bytes_each(cost: Cost, plan: PrecisionPlan, element_bytes: int) -> float:
    """Bytes of one element of the op's matrix, with its share of scales, zero points and order."""
    if _static(cost, plan):  # a scale per output or one in all, and the input's step
        outputs = cost.matrix_elements // cost.matrix_inputs
        steps = outputs if FORMS[plan.at(cost.path)].by_channel else 1
        return 1 + element_bytes * (steps + 1) / cost.matrix_elements
    bits, block = weight_bits(cost, plan), _block(cost, plan)
    if bits is not None and _by_channel(cost, plan):
        block = cost.matrix_inputs
    if bits is None or block is None:
        return element_bytes
    storage = plan.storage_at(cost.path) if cost.op == "linear" else None
    of_block, order = float(element_bytes), 0.0
    if storage is not None and storage.zero_points:
        of_block += bits / 8
    if storage is not None and storage.ordered:
        order = 8 * cost.matrix_inputs / cost.matrix_elements
    return bits / 8 + of_block / block + order


def stored_bytes(model: Model, plan: PrecisionPlan, element_bytes: int) -> dict[str, int]:
    """Bytes of each component's weights: parameters as `plan` wants them, tables in float32.

    element_bytes: of a parameter that the plan leaves in float.
    """
    axes = image_axes(model, 1, 1) | {"sequence": 1, "context": 1}
    sizes = {}
    for component in components.components(model):
        counter = count(component, axes)
        matrices = {_key(cost, component): cost for cost in counter.costs if cost.matrix_elements}
        total = 4.0 * sum(table.size for table in counter.tables.values())
        for key, shape in component.shapes.items():
            matrix = matrices.get(key)
            size = element_bytes if matrix is None else _bytes_each(matrix, plan, element_bytes)
            total += math.prod(shape) * size
        sizes[component.name] = round(total)
    return sizes


def _key(cost: Cost, component: Component) -> str:
    """The matrix that an op multiplies by, as the weights file names it."""
    return cost.path.removeprefix(f"{component.name}/").replace("/", ".") + ".weight"


def state_elements(component: Component, axes: Mapping[str, int]) -> int:
    """Elements of the states (the KV cache) that a component carries from call to call.

    axes: the lengths of those that states have, "batch" and "context".
    """
    states = {port.updates for port in component.outputs if port.updates}
    return sum(_spec(port, axes).size for port in component.inputs if port.name in states)


def image_axes(model: Model, views: int, placed: int) -> dict[str, int]:
    """All axes that change with an image: `views` of the size the encoders were published for,
    `placed` tokens of it in the prompt.
    """
    axes = {"tiles": views, "placed": placed, "rows": 1, "batch": 1, "scored": 1}
    axes["masks"] = 1
    for encoder in model.encoders:
        height, width = model.images.encoders[encoder.name].size
        axes |= {"height": height, "width": width}
        if isinstance(encoder.config.tokens, str):
            component = components.encoder_component(encoder)
            shapes = outputs(component, axes | {"tiles": 1})
            axes["tokens"] = shapes[component.outputs[0].name].shape[1]
    return axes


def outputs(component: Component, axes: Mapping[str, int]) -> dict[str, Spec]:
    """Shapes of a component's outputs."""
    return component.forward(ShapeOps(), Weights(Specs(component.shapes)), inputs(component, axes))


def inputs(component: Component, axes: Mapping[str, int]) -> dict[str, Spec]:
    """Shapes of a component's inputs."""
    return {port.name: _spec(port, axes) for port in component.inputs}


def _spec(port: Port, axes: Mapping[str, int]) -> Spec:
    return Spec(tuple(axes[n] if isinstance(n, str) else n for n in port.shape))
