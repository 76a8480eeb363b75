"""The function for attention with decomposed relative positions (SAM's image encoder).

A bias for each pair of cells is a tensor as large as all scores. But it is a sum of products: of a
query with its row of the table for each height, and of one with 1 at the key's own height; the
same for widths. So the biases become channels of q and k: q' = [q sqrt(e / d), by_row sqrt(e),
by_column sqrt(e)] and k' = [k, ones at its row, ones at its column] have q' . k' / sqrt(e) equal
to the score with its bias, where e = d + height + width. Kernels of plain attention go over that.
"""

from __future__ import annotations

import onnx

from edgevlm.export.nodes import function, ints, node, shape


def relative_attention() -> onnx.FunctionProto:
    """Unmasked attention over a grid of cells, see Ops.attention_relative."""
    return function(
        "RelativeAttention",
        ["q", "k", "v", "rows", "columns"],
        ["y"],
        ["num_heads", "head_dim", "height", "width"],
        [
            *_numbers(),
            *_axis("row", "@height", "rows"),
            *_axis("column", "@width", "columns"),
            *_query(),
            *_key(),
            node(
                "Attention",
                ["q_joined", "k_joined", "v"],
                ["y"],
                q_num_heads="@num_heads:INT",
                kv_num_heads="@num_heads:INT",
                is_causal=0,
                softcap=0.0,
                qk_matmul_output_mode=0,
            ),
        ],
    )


def _numbers() -> list[onnx.NodeProto]:
    """e, and the factors sqrt(e) and sqrt(e / d), in float32."""
    return [
        node("Constant", [], ["zero"], value_int=0),
        node("Constant", [], ["one"], value_int=1),
        node("Constant", [], ["one_float"], value_float=1.0),
        node("Constant", [], ["d"], value_int="@head_dim:INT"),
        node("Constant", [], ["h"], value_int="@height:INT"),
        node("Constant", [], ["w"], value_int="@width:INT"),
        node("Add", ["h", "w"], ["cells"]),
        node("Add", ["cells", "d"], ["e"]),
        node("Cast", ["d"], ["d_float"], to=onnx.TensorProto.FLOAT),
        node("Cast", ["e"], ["e_float"], to=onnx.TensorProto.FLOAT),
        node("Sqrt", ["d_float"], ["d_root"]),
        node("Sqrt", ["e_float"], ["e_root"]),
        node("Div", ["e_root", "d_root"], ["ratio_float"]),
        node("CastLike", ["e_root", "q"], ["bias_factor"]),
        node("CastLike", ["ratio_float", "q"], ["q_factor"]),
        ints("first", 0),
        ints("second", 1),
    ]


def _axis(name: str, length: str, table: str) -> list[onnx.NodeProto]:
    """Of one axis of the grid: the table's rows as [query, d, key], times sqrt(e), and the
    identity [length, length], which has a one where a key stands.
    """
    size = {"@height": "h", "@width": "w"}[length]
    return [
        node("Range", ["zero", size, "one"], [f"{name}_at"]),
        node("Unsqueeze", [f"{name}_at", "second"], [f"{name}_query"]),
        node("Sub", [f"{name}_query", f"{name}_at"], [f"{name}_offset"]),
        node("Sub", [size, "one"], [f"{name}_last"]),
        node("Add", [f"{name}_offset", f"{name}_last"], [f"{name}_index"]),
        node("Gather", [table, f"{name}_index"], [f"{name}_table"], axis=0),
        node("Transpose", [f"{name}_table"], [f"{name}_matrix"], perm=[0, 2, 1]),
        node("Mul", [f"{name}_matrix", "bias_factor"], [f"{name}_scaled"]),
        node("Cast", [f"{name}_offset"], [f"{name}_offset_float"], to=onnx.TensorProto.FLOAT),
        node("Abs", [f"{name}_offset_float"], [f"{name}_distance"]),
        node("Sub", ["one_float", f"{name}_distance"], [f"{name}_near"]),
        node("Relu", [f"{name}_near"], [f"{name}_identity"]),
    ]


def _query() -> list[onnx.NodeProto]:
    """q' as [B, S, heads * e]."""
    return [
        *shape("split", 0, "@height", "@width", "@num_heads", "@head_dim"),
        node("Reshape", ["q", "split"], ["q_cells"], allowzero=0),
        *shape("row_split", 0, "@height", -1, "@head_dim"),
        node("Reshape", ["q_cells", "row_split"], ["q_rows"], allowzero=0),
        node("MatMul", ["q_rows", "row_scaled"], ["by_row_flat"]),
        *shape("row_apart", 0, -1, "@num_heads", "@height"),
        node("Reshape", ["by_row_flat", "row_apart"], ["by_row"], allowzero=0),
        node("Transpose", ["q_cells"], ["q_turned"], perm=[0, 2, 1, 3, 4]),
        *shape("column_split", 0, "@width", -1, "@head_dim"),
        node("Reshape", ["q_turned", "column_split"], ["q_columns"], allowzero=0),
        node("MatMul", ["q_columns", "column_scaled"], ["by_column_flat"]),
        *shape("column_apart", 0, "@width", "@height", "@num_heads", "@width"),
        node("Reshape", ["by_column_flat", "column_apart"], ["by_column_turned"], allowzero=0),
        node("Transpose", ["by_column_turned"], ["by_column_cells"], perm=[0, 2, 1, 3, 4]),
        *shape("column_joined", 0, -1, "@num_heads", "@width"),
        node("Reshape", ["by_column_cells", "column_joined"], ["by_column"], allowzero=0),
        *shape("heads_apart", 0, -1, "@num_heads", "@head_dim"),
        node("Reshape", ["q", "heads_apart"], ["q_heads"], allowzero=0),
        node("Mul", ["q_heads", "q_factor"], ["q_scaled"]),
        node("Concat", ["q_scaled", "by_row", "by_column"], ["q_extended"], axis=3),
        ints("flat", 0, 0, -1),
        node("Reshape", ["q_extended", "flat"], ["q_joined"], allowzero=0),
    ]


def _key() -> list[onnx.NodeProto]:
    """k' as [B, S, heads * e]."""
    return [
        node("Unsqueeze", ["row_identity", "second"], ["row_ones"]),
        *shape("row_places", "@height", "@width", "@height"),
        node("Expand", ["row_ones", "row_places"], ["row_grid"]),
        node("Unsqueeze", ["column_identity", "first"], ["column_ones"]),
        *shape("column_places", "@height", "@width", "@width"),
        node("Expand", ["column_ones", "column_places"], ["column_grid"]),
        node("Concat", ["row_grid", "column_grid"], ["places_grid"], axis=2),
        node("Unsqueeze", ["cells", "first"], ["cells_1"]),
        *shape("places_split", 1, -1, 1, "cells_1"),
        node("Reshape", ["places_grid", "places_split"], ["places_float"], allowzero=0),
        node("CastLike", ["places_float", "k"], ["places"]),
        node("Reshape", ["k", "heads_apart"], ["k_heads"], allowzero=0),
        node("Shape", ["k"], ["batch"], start=0, end=1),
        *shape("places_many", "batch", 1, "@num_heads", 1),
        node("Expand", ["places", "places_many"], ["k_places"]),
        node("Concat", ["k_heads", "k_places"], ["k_extended"], axis=3),
        node("Reshape", ["k_extended", "flat"], ["k_joined"], allowzero=0),
    ]
