"""How nodes become what TensorRT's parser takes: one small function each.

Codes of weights are declared signed here, or as the floats that they stand for; `codes.py` of the
backend writes them so. A code less its zero point, 128 or 8, is the same bits with the highest
flipped.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from edgevlm.engines.lowering.graph import Body, Rewriter, attribute
from edgevlm.engines.lowering.inline import inlined

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


def to_channels_first(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """What a convolution reads, and what is added behind it (a block of ConvNeXt), as one tensor.

    The sum reads the convolution's input, turned back. Else the builder writes the same bytes
    twice, as one tensor with channels first and one with channels last: a pass more a block.
    """
    (x,), (first,) = node.input, node.output
    sums = [user for user in r.users(x) if user.op_type == "Add"]
    if len(sums) != 1 or {user.op_type for user in r.users(first)} != {"Conv"}:
        return [node]
    b = Body(node.name, r)
    back = b("Transpose", [first], "back", perm=[0, 2, 3, 1])
    for at, name in enumerate(sums[0].input):
        sums[0].input[at] = back if name == x else name
    return [node, *b.nodes]


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


def relative_attention(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The body, whose keys have more channels than its values, which the parser refuses.

    The channels that keys have more go into the values too, and out of the result again.
    """
    function = r.function(node)
    assert function is not None
    *nodes, attends = inlined(node, function, r)
    heads, head_dim = (int(attribute(node, name)) for name in ("num_heads", "head_dim"))
    b = Body(node.name, r)
    q, k, v = attends.input
    b.nodes += nodes
    apart = b("Reshape", [v, b.ints(0, 0, heads, head_dim)], "v_heads", allowzero=0)
    wide = b("Concat", [apart, f"{node.name}/k_places"], "v_extended", axis=3)
    q, k = (b.heads(x, heads, name) for x, name in ((q, "q"), (k, "k")))
    mixed = b("Attention", [q, k, b("Transpose", [wide], "v_bhsd", perm=[0, 2, 1, 3])], "mixed")
    b.nodes[-1].attribute.append(onnx.helper.make_attribute("is_causal", 0))
    own = b("Slice", [mixed, b.ints(0), b.ints(head_dim), b.ints(3)], "own")
    return b.joined(own, node.output)


def ms_deform_attn(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """Deformable attention as its body has it, but for the order of axes: points before queries.

    The builder then adds the points while it samples, and of one level makes two kernels, not six.
    """
    value, offsets, scores, reference = node.input
    names = ("num_heads", "num_points", "head_dim", "levels", "height", "width")
    heads, points, head_dim, levels, *size = (int(attribute(node, name)) for name in names)
    queries, split, b = r.shape_of(reference)[0], [0, 0, heads, levels, points], Body(node.name, r)

    def shaped(x: str, label: str, *to: int) -> str:
        return b("Reshape", [x, b.ints(*to)], label, allowzero=0)

    def moved(x: str, label: str, *perm: int) -> str:
        return b("Transpose", [x], f"{label}_transposed", perm=perm)

    value_f32, offsets_f32, scores_f32 = (
        b("Cast", [x], f"{label}_f32", to=TensorProto.FLOAT)
        for x, label in ((value, "value"), (offsets, "offsets"), (scores, "scores"))
    )
    cells = shaped(value_f32, "cells", 0, levels, *size, heads, head_dim)
    image = shaped(moved(cells, "cells", 0, 4, 1, 5, 2, 3), "image", -1, head_dim, *size)
    places = _sampling_points(b, shaped(offsets_f32, "shifts", *split, 2), reference, size)
    grid = shaped(moved(places, "points", 0, 2, 3, 4, 1, 5), "grid", -1, points, queries, 2)
    joint = shaped(scores_f32, "joint", 0, 0, heads, -1)
    shares = shaped(b("Softmax", [joint], "softmaxed", axis=-1), "apart", *split)
    weights = shaped(moved(shares, "apart", 0, 2, 3, 4, 1), "weights", -1, 1, points, queries)
    how = {"mode": "linear", "padding_mode": "zeros", "align_corners": 0}
    weighted = b("Mul", [b("GridSample", [image, grid], "sampled", **how), weights], "weighted")
    summed = b("ReduceSum", [weighted, b.ints(2)], "points_sum", keepdims=0)
    if levels > 1:
        summed = shaped(summed, "levels", -1, heads, levels, head_dim, queries)
        summed = b("ReduceSum", [summed, b.ints(2)], "levels_sum", keepdims=0)
    else:
        summed = shaped(summed, "levels_sum", -1, heads, head_dim, queries)
    joined = shaped(moved(summed, "levels_sum", 0, 3, 1, 2), "joined", 0, 0, -1)
    return b.ending("CastLike", [joined, value], node.output)


def _sampling_points(b: Body, shifts: str, reference: str, size: list[int]) -> str:
    """Where to sample, as GridSample counts, -1 to 1: [B, Q, heads, levels, points, 2]."""
    height, width = size
    step = np.asarray([2 / width, 2 / height], np.float32)
    scaled = b("Mul", [shifts, b.rewriter.constant(f"step.{width}_{height}", step)], "scaled")
    doubled = b("Mul", [reference, b.float32(2.0)], "doubled")
    shifted = b("Sub", [doubled, b.float32(1.0)], "shifted")
    centre = b("Unsqueeze", [shifted, b.ints(1, 2, 3)], "centre")
    return b("Add", [scaled, centre], "points")


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
