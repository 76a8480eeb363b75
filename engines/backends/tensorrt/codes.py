"""The weights as TensorRT's parser takes them: codes signed, or floats where it has no kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from edgevlm.toolkit.checkpoints.safetensors_io import (
    Blocks,
    SafetensorsFile,
    TensorSpec,
    row_blocks,
    write_safetensors,
)
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.blockwise import (
    FORMATS,
    SCALE,
    ZERO_POINTS,
    Bits,
    dequantize,
    unpack,
)

_FLOATS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}
_SIGNED: dict[int, int] = {onnx.TensorProto.INT8: 0x80, onnx.TensorProto.INT4: 0x88}


def write(source: Path, target: Path, model: onnx.ModelProto) -> None:
    """Write the weights that a lowered graph reads to `target`, and point its tensors there.

    A stored unsigned code less its zero point has the same bits but the highest. Scales of 8-bit
    codes are above zero. Tensors that the graph declares as floats are the stored codes' values.
    """
    file = SafetensorsFile(source)
    tensors = {_offset(t): t for t in model.graph.initializer if t.data_location == t.EXTERNAL}
    names = {entry.offset: name for name, entry in file.entries.items()}
    flips = {
        names[offset]: _SIGNED[tensor.data_type]
        for offset, tensor in tensors.items()
        if tensor.data_type in _SIGNED and file.entries[names[offset]].dtype == "uint8"
    }
    floats = {
        names[offset]: _FLOATS[tensor.data_type]
        for offset, tensor in tensors.items()
        if tensor.data_type in _FLOATS and file.entries[names[offset]].dtype == "uint8"
    }
    scales = _scales_of_8_bits(model, {t.name: names[offset] for offset, t in tensors.items()})
    specs = []
    for name in (names[offset] for offset in sorted(tensors)):
        entry = file.entries[name]
        if name in floats:
            shape = tuple(tensors[entry.offset].dims)
            specs.append(TensorSpec(name, floats[name], shape))
        else:
            specs.append(TensorSpec(name, "int8" if name in flips else entry.dtype, entry.shape))

    def produce(spec: TensorSpec) -> Blocks:
        if spec.name in floats:
            return row_blocks(_floats(file, spec.name))
        blocks = row_blocks(file.read(spec.name))
        if spec.name in flips:
            bits = np.uint8(flips[spec.name])
            return ((block ^ bits).view(np.int8) for block in blocks)
        return map(_above_zero, blocks) if spec.name in scales else blocks

    written = write_safetensors(target, specs, produce)
    for offset, tensor in tensors.items():
        entry = written.entries[names[offset]]
        span = {"location": target.name, "offset": entry.offset, "length": entry.nbytes}
        del tensor.external_data[:]
        for key, value in span.items():
            tensor.external_data.add(key=key, value=str(value))


def needed(model: onnx.ModelProto) -> bool:
    """Whether the stored weights have to be changed at all."""
    external = [t for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    codes = (".int8", ".int4")
    return any(t.data_type in _SIGNED or t.name.endswith(codes) for t in external)


def _floats(file: SafetensorsFile, name: str) -> Array:
    """What stored codes in blocks stand for, as rows [outputs, inputs] in their stored order."""
    bits: Bits = next(f.bits for f in FORMATS if name.endswith(f.suffix))
    zeros = None
    if name + ZERO_POINTS in file.entries:
        stored = file.read(name + ZERO_POINTS)
        zeros = stored if bits == 8 else unpack(stored)
    return dequantize(file.read(name), file.read(name + SCALE), bits, zeros)


def _scales_of_8_bits(model: onnx.ModelProto, stored: dict[str, str]) -> set[str]:
    """The stored tensors that scale 8-bit codes."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    return {
        stored[node.input[1]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and types.get(node.input[0]) == onnx.TensorProto.INT8
        and node.input[1] in stored
    }


def _above_zero(scales: Array) -> Array:
    """Scales of 0, of channels of zeros, as the smallest number that the builder takes."""
    info = np.finfo(scales.dtype)
    least = info.smallest_subnormal if scales.dtype == np.float16 else info.tiny
    return np.asarray(np.maximum(scales, least))


def _offset(tensor: onnx.TensorProto) -> int:
    return next(int(item.value) for item in tensor.external_data if item.key == "offset")
