"""How nodes become what TensorRT's parser takes: one small function each.

Codes of weights are declared signed here, or as the floats that they stand for; `codes.py` of the
backend writes them so. A code less its zero point, 128 or 8, is the same bits with the highest
flipped.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from edgevlm.engines.lowering.graph import Body, Rewriter, attribute

_SIGNED: dict[int, int] = {
    TensorProto.UINT8: TensorProto.INT8,
    TensorProto.UINT4: TensorProto.INT4,
}
# For names: what the parser does not know of Attention, and has no effect at the values we record.
_UNKNOWN = ("softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads")


def softmax(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """Of a stored vector (COMM's shares of levels) as of one row."""
    if not r.is_stored(node.input[0]) or len(r.shape_of(node.input[0])) > 1:
        return [node]
    b = Body(node.name, r)
    first = b.ints(0)
    row = b("Unsqueeze", [node.input[0], first], "row")
    shares = b("Softmax", [row], "shares", axis=-1)
    return b.ending("Squeeze", [shares, first], node.output)


def swish(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """x * sigmoid(x), as we record alpha 1."""
    b = Body(node.name, r)
    gate = b("Sigmoid", node.input, "gate")
    return b.ending("Mul", [node.input[0], gate], node.output)


def attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """Attention over [B, heads, S, d]; joined heads are split before and joined after."""
    kept = [a for a in node.attribute if a.name not in _UNKNOWN]
    heads = {a.name: a.i for a in node.attribute}.get("q_num_heads")
    if heads is None:
        plain = r.node("Attention", node.input, node.output, node.name)
        plain.attribute.extend(kept)
        return [plain]
    b = Body(node.name, r)
    split = [b.heads(x, heads, name) for x, name in zip(node.input, "qkv", strict=True)]
    mixed = b("Attention", split, "mixed")
    b.nodes[-1].attribute.extend(kept)
    return b.joined(mixed, node.output)


def blocked_linear(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """x times a weight in symmetric codes [outputs, inputs], a scale for each block of inputs."""
    x, stored, scale, _ = node.input
    sign(r, stored)
    b = Body(node.name, r)
    block = int(attribute(node, "block_size"))
    floats = b("DequantizeLinear", [stored, scale], "weight", axis=1, block_size=block)
    transposed = b("Transpose", [floats], "transposed", perm=[1, 0])
    return b.ending("MatMul", [x, transposed], node.output)


def blocked_linear_in_floats(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """x times the weight [outputs, inputs] that the codes stand for, in its scales' format."""
    x, stored, scale, _ = node.input
    r.tensor(stored).data_type = r.tensor(scale).data_type
    b = Body(node.name, r)
    transposed = b("Transpose", [stored], "transposed", perm=[1, 0])
    return b.ending("MatMul", [x, transposed], node.output)


def blocked_embed(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """Rows of a table in symmetric codes; the builder reads only those that are asked for."""
    ids, stored, scale = node.input
    sign(r, stored)
    block = int(attribute(node, "block_size"))
    floats = r.once(
        "DequantizeLinear", [stored, scale], f"{stored}.floats", axis=1, block_size=block
    )
    return [r.node("Gather", [floats, ids], node.output, node.name, axis=0)]


def row_quantize(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """Nothing: the product reads the input itself."""
    return []


def row_quantized_linear(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The input in float times a weight [inputs, outputs] in codes, a scale for each output."""
    codes, _, stored, scale = node.input
    (x,) = r.maker(codes).input
    sign(r, stored)
    b = Body(node.name, r)
    floats = b("DequantizeLinear", [stored, scale], "weight", axis=1)
    return b.ending("MatMul", [x, floats], node.output)


def sign(r: Rewriter, stored: str) -> None:
    """Declare a stored tensor of unsigned codes as signed ones."""
    tensor = r.tensor(stored)
    tensor.data_type = _SIGNED.get(tensor.data_type, tensor.data_type)
