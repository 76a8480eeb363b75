"""Recording weights in 8 or 4 bits: which they are, how they are stored, and their functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import helper

from edgevlm.export.nodes import function, ints, node, shape
from edgevlm.toolkit.checkpoints.safetensors_io import TensorSpec
from edgevlm.toolkit.quantization.blockwise import (
    ORDER,
    SCALE,
    TABLE,
    ZERO_POINT,
    ZERO_POINTS,
    Bits,
    StorageFormat,
    pack,
)
from edgevlm.toolkit.quantization.plan import TABLES_IN_8_BITS, PrecisionPlan

CODES: dict[Bits, int] = {8: onnx.TensorProto.UINT8, 4: onnx.TensorProto.UINT4}


class Emitter(Protocol):
    """What is needed of a recorder."""

    small: dict[str, onnx.TensorProto]

    def one(self, kind: str, inputs: Sequence[str], name: str = "", **attrs: Any) -> str: ...


class QuantizedWeights:
    """The weights of one component that its graph takes in 8 or 4 bits, by key."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.formats: dict[str, StorageFormat] = {}

    def use(self, weight: str, storage: StorageFormat) -> bool:
        """Store `weight` in this storage; False where no block divides its inputs."""
        if storage.block_in(self._rows(weight, storage)[1]) is None:
            return False
        self.formats[weight] = storage
        return True

    def _rows(self, weight: str, storage: StorageFormat) -> tuple[int, int]:
        first, second = self.shapes[weight]
        return (second, first) if storage.transposed else (first, second)

    def sizes(self, weight: str) -> tuple[int, int, int]:
        """Outputs, inputs and block of a weight in use."""
        storage = self.formats[weight]
        outputs, inputs = self._rows(weight, storage)
        block = storage.block_in(inputs)
        assert block is not None
        return outputs, inputs, block

    def planned(self, weight: str, dtype: str) -> list[TensorSpec]:
        """The tensors of a weight in the weights file: codes, scales and perhaps zero points."""
        storage, (outputs, inputs, block) = self.formats[weight], self.sizes(weight)
        name = weight + storage.suffix
        blocks = inputs // block
        zeros = TensorSpec(name + ZERO_POINTS, "uint8", (outputs, blocks * storage.bits // 8))
        return [
            TensorSpec(name, "uint8", (outputs, inputs * storage.bits // 8)),
            TensorSpec(name + SCALE, dtype, (outputs, blocks)),
            *([zeros] if storage.zero_points else []),
            *([TensorSpec(name + ORDER, "int64", (inputs,))] if storage.ordered else []),
        ]

    def declared(self, name: str) -> tuple[int, tuple[int, ...]] | None:
        """ONNX type and shape of stored codes or zero points; None for any other tensor."""
        stem = name.removesuffix(ZERO_POINTS)
        for weight, storage in self.formats.items():
            if stem == weight + storage.suffix:
                outputs, inputs, block = self.sizes(weight)
                columns = inputs if stem == name else inputs // block
                return CODES[storage.bits], (outputs, columns)
        return None


def table_format(plan: PrecisionPlan, path: str) -> StorageFormat | None:
    """How the plan wants an embedding table stored, for which there is one way; None in float."""
    return TABLE if plan.at(path) in TABLES_IN_8_BITS else None


def product(e: Emitter, stored: QuantizedWeights, x: str, weight: str, path: str) -> str:
    """x times a stored weight."""
    storage, (outputs, inputs, block) = stored.formats[weight], stored.sizes(weight)
    name = weight + storage.suffix
    zeros = name + ZERO_POINTS
    if not storage.zero_points:
        zeros = _zero_points(e, storage.bits, (outputs, inputs // block))
    if storage.ordered:
        x = e.one("Gather", [x, name + ORDER], f"{path}/order", axis=-1)
    return e.one(
        "edgevlm.BlockedLinear",
        [x, name, name + SCALE, zeros],
        path,
        bits=storage.bits,
        block_size=block,
        in_features=inputs,
        out_features=outputs,
        zero_points=int(storage.zero_points),
    )


def rows(e: Emitter, stored: QuantizedWeights, ids: str, weight: str, path: str) -> str:
    """Rows of a stored table."""
    name, (_, _, block) = weight + stored.formats[weight].suffix, stored.sizes(weight)
    inputs = [ids, name, name + SCALE]
    return e.one("edgevlm.BlockedEmbed", inputs, path, block_size=block)


def _zero_points(e: Emitter, bits: Bits, shape: tuple[int, int]) -> str:
    """The zero points of all blocks, shared by weights of one shape."""
    name, count = f"zero_point.uint{bits}.{shape[0]}x{shape[1]}", shape[0] * shape[1]
    if name not in e.small:
        codes = np.full(count + count % 2, ZERO_POINT[bits], np.uint8)
        content = (codes[:count] if bits == 8 else pack(codes)).tobytes()
        e.small[name] = helper.make_tensor(name, CODES[bits], shape, content, raw=True)
    return name


def blocked_linear() -> onnx.FunctionProto:
    """x @ weight^T, the weight [outputs, inputs] in 8 or 4 bits, a scale per block_size inputs.

    zero_points: whether they are stored with the weight; 0 if all are 8 or 128.
    """
    return function(
        "BlockedLinear",
        ["x", "stored", "scale", "zero_point"],
        ["y"],
        ["bits", "block_size", "in_features", "out_features", "zero_points"],
        [
            node(
                "DequantizeLinear",
                ["stored", "scale", "zero_point"],
                ["weight"],
                axis=1,
                block_size="@block_size:INT",
            ),
            node("Transpose", ["weight"], ["transposed"], perm=[1, 0]),
            node("MatMul", ["x", "transposed"], ["y"]),
        ],
    )


def blocked_embed() -> onnx.FunctionProto:
    """Rows of a table in 8 bits; only the rows that are read become floats."""
    return function(
        "BlockedEmbed",
        ["ids", "stored", "scale"],
        ["y"],
        ["block_size"],
        [
            node("Gather", ["stored", "ids"], ["codes"], axis=0),
            node("Cast", ["codes"], ["f32"], to=onnx.TensorProto.FLOAT),
            node("Constant", [], ["zero_point"], value_float=128.0),
            node("Sub", ["f32", "zero_point"], ["steps"]),
            *shape("split", 0, 0, -1, "@block_size"),
            node("Reshape", ["steps", "split"], ["blocks"], allowzero=0),
            node("Gather", ["scale", "ids"], ["scales"], axis=0),
            node("Cast", ["scales"], ["scales_f32"], to=onnx.TensorProto.FLOAT),
            ints("last", -1),
            node("Unsqueeze", ["scales_f32", "last"], ["column"]),
            node("Mul", ["blocks", "column"], ["values"]),
            ints("flat", 0, 0, -1),
            node("Reshape", ["values", "flat"], ["joined"], allowzero=0),
            node("CastLike", ["joined", "scale"], ["y"]),
        ],
    )
