"""Composite ops written in simpler ones: their definition, and what wrappers run.

A recorder may write such an op as one function; a wrapper that watches or changes the linears
inside (Observe, Quantize, Count) runs this form instead, and sees them.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgevlm.toolkit.ops.vocabulary import Ops, T, Weights


def layer_merge(op: Ops[T], xs: Sequence[T], w: Weights[T], eps: float) -> T:
    """Ops.layer_merge: the scales go into the norms, so that one product does all levels."""
    scale = op.reshape(w["scale"], (-1, 1))
    norm, linear = w / "norm", w / "linear"
    gains, shifts = op.mul(norm["weight"], scale), op.mul(norm["bias"], scale)

    def row(table: T, i: int) -> T:
        return op.reshape(op.slice(table, 0, i, i + 1), (-1,))

    normed = [
        op.layer_norm(x, (w / f"norm.{i}").holding(weight=row(gains, i), bias=row(shifts, i)), eps)
        for i, x in enumerate(xs)
    ]
    product = op.linear(op.concat(normed, 2), linear.holding(weight=linear["weight"]))
    return op.add(product, op.sum(op.mul(linear["bias"], scale), (0,)))
