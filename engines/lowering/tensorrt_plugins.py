"""Calls that stay for plugins of ours, where they are asked for: engines/plugins has their kernels.

Rows decide by what the builder makes of a body, and it fuses ours into few kernels; that a plugin
is faster has not been measured, so none is taken unasked. A call says which plugin it wants, and
its function stays in the graph: where no such plugin is registered, the parser takes the body.
Before 10.7 it takes the body always, so it must go.
"""

from __future__ import annotations

import math
from typing import Any

import onnx
from onnx import helper

from edgevlm.engines.lowering import tensorrt_older as older
from edgevlm.engines.lowering.capabilities import Rewrite, Row
from edgevlm.engines.lowering.graph import Body, Rewriter, attribute, used

_WANTED = {"plugin_namespace": "edgevlm", "plugin_version": "1"}
_BODY_YIELDS_SINCE = (10, 7)
_ATTENTION_SINCE = (10, 14)
ROTATION = "RotateHeads"
_ROTATED = ("q_rotated", "k_rotated")


def kept(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The call itself, with what names its plugin."""
    return [_wanting(node, r)]


def layer_merge(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """The call with the size of its output, which a kernel has compiled in."""
    return [_wanting(node, r, output_size=r.shape_of(node.input[4])[1])]


def rotary(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """A call that rotates q and k, and Attention."""
    b = Body(node.name, r)
    q, k, v = _turned(b, node)
    return b.joined(b("Attention", [q, k, v], "mixed", is_causal=0), node.output)


def older_rotary(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """A call that rotates q and k, and two products around a Softmax."""
    b = Body(node.name, r)
    q, k, v = _turned(b, node)
    scale = b.float32(1 / math.sqrt(int(attribute(node, "head_dim"))))
    return b.joined(older.attended(b, q, k, v, scale, None), node.output)


def alone(rewrite: Rewrite, function: str) -> Rewrite:
    """A rewrite after which the function that it calls is gone: nothing but a plugin can run it."""

    def rewritten(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
        nodes = rewrite(node, r)
        for body in [f for f in r.model.functions if f.name == function]:
            r.model.functions.remove(body)
        return nodes

    return rewritten


def _wanting(node: onnx.NodeProto, r: Rewriter, **more: Any) -> onnx.NodeProto:
    """A call with what names its plugin, and further attributes."""
    op = f"{node.domain}.{node.op_type}"
    named = r.node(op, node.input, node.output, node.name, **more, **_WANTED)
    named.attribute.extend(node.attribute)
    return named


def _turned(b: Body, node: onnx.NodeProto) -> tuple[str, str, str]:
    """q and k rotated, and v, each [B, heads, S, d]."""
    q, k, v, angles = node.input
    heads, head_dim = (int(attribute(node, name)) for name in ("num_heads", "head_dim"))
    _declare_rotation(node, b.rewriter)
    names = [f"{b.name}/{name}" for name in _ROTATED]
    sizes = {"num_heads": heads, "head_dim": head_dim}
    call = b.rewriter.node(
        f"{node.domain}.{ROTATION}", [q, k, angles], names, f"{b.name}/rotate", **sizes, **_WANTED
    )
    b.nodes.append(call)
    return names[0], names[1], b.heads(v, heads, "v")


def _declare_rotation(node: onnx.NodeProto, r: Rewriter) -> None:
    """Add the function that rotates: the part of the attention's body that its call replaces."""
    whole = r.function(node)
    if whole is None or any(f.name == ROTATION for f in r.model.functions):
        return
    nodes = used(list(whole.node), set(_ROTATED))
    inputs, opsets = ["q", "k", "angles"], list(whole.opset_import)
    sizes = ["num_heads", "head_dim"]
    part = helper.make_function(
        whole.domain, ROTATION, inputs, list(_ROTATED), nodes, opsets, sizes
    )
    r.model.functions.append(part)


def _row(rewrite: Rewrite, function: str, why: str) -> Row:
    """A plugin's row since the release that prefers plugins to bodies, and the one before."""
    into = f"edgevlm.{function}"
    before = Row("swap", f"{why}; without its body", alone(rewrite, function), into)
    return Row("swap", why, rewrite, into, _BODY_YIELDS_SINCE, None, before)


_ASKED = "as asked, a plugin's kernel in place of the body"
_OLDER = _row(older_rotary, ROTATION, f"{_ASKED}, before 10.14 around two products")
PLUGINS: dict[str, Row] = {
    "edgevlm.MSDeformAttn": _row(
        kept, "MSDeformAttn", f"{_ASKED}, of which the builder makes two to four kernels"
    ),
    "edgevlm.LayerMerge": _row(
        layer_merge, "LayerMerge", f"{_ASKED}, whose levels the builder joins while it norms them"
    ),
    "edgevlm.RotaryAttention": Row(
        "swap",
        f"{_ASKED}, of which the builder makes two kernels that move the same bytes",
        rotary,
        f"edgevlm.{ROTATION}",
        _ATTENTION_SINCE,
        None,
        _OLDER,
    ),
}
# The op of each call that stays: RotateHeads is a part of RotaryAttention.
OPS = {row.into.rpartition(".")[2]: op.rpartition(".")[2] for op, row in PLUGINS.items()}
