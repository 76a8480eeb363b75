"""Which op is the first wrong one? The lowered graph against the portable one, op by op.

Both graphs name their tensors alike, so the values after every op that both have can be compared.
Tensors are looked at a few dozen at a time: memory stays that of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgevlm.engines.lowering.graph import op_name
from edgevlm.toolkit.bundle.goldens import AXES, Golden
from edgevlm.toolkit.bundle.manifest import Bundle, ComponentRecord
from edgevlm.toolkit.ops.vocabulary import Array

_AT_ONCE = 48


@dataclass(frozen=True)
class Divergence:
    """The first tensor beyond the tolerance, and the op that made it in the lowered graph."""

    tensor: str
    op: str
    difference: float


def first_divergence(
    bundle: Bundle, record: ComponentRecord, folder: Path, golden: Golden, tolerance: float
) -> Divergence | None:
    """Compare the engine's graph in `folder` with the bundle's on one golden call.

    None if every tensor that both graphs have is within the tolerance: then the difference lies
    in an op that only the lowered graph has, or in the portable graph itself.
    """
    portable, lowered = (_graph(place, record) for place in (bundle.path, folder))
    makers = {out: op_name(n) for n in lowered.graph.node for out in n.output if out}
    known = {out for n in portable.graph.node for out in n.output}
    names = [name for name in makers if name in known]
    feed = {**_states(record), **golden.inputs}
    for start in range(0, len(names), _AT_ONCE):
        group = names[start : start + _AT_ONCE]
        expected = _values(bundle.path, portable, group, feed, plain=True)
        found = _values(folder, lowered, group, feed, plain=False)
        for name, worst in _differences(group, found, expected):
            if not worst <= tolerance:
                return Divergence(name, makers[name], worst)
    return None


def _graph(folder: Path, record: ComponentRecord) -> onnx.ModelProto:
    return onnx.load(str(folder / record.graph), load_external_data=False)


def _states(record: ComponentRecord) -> dict[str, Array]:
    """Empty states: a decoder's first call."""
    names = {port.updates for port in record.outputs if port.updates}
    return {
        port.name: np.zeros([AXES[n] if isinstance(n, str) else n for n in port.shape], np.float32)
        for port in record.inputs
        if port.name in names
    }


def _values(
    folder: Path,
    model: onnx.ModelProto,
    names: list[str],
    feed: Mapping[str, Array],
    *,
    plain: bool,
) -> dict[str, Array]:
    """Run with `names` as outputs; plain: without ONNX Runtime's own rewriting."""
    import onnxruntime

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    path = folder / ".bisect.onnx"
    path.write_bytes(shown.SerializeToString())
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        wanted = {value.name for value in session.get_inputs()}
        found = session.run(names, {k: v for k, v in feed.items() if k in wanted})
    finally:
        path.unlink()
    return dict(zip(names, found, strict=True))


def _differences(
    names: list[str], found: Mapping[str, Array], expected: Mapping[str, Array]
) -> Iterator[tuple[str, float]]:
    for name in names:
        a, b = found[name], expected[name]
        if name.startswith("present.") or a.dtype.kind != "f":
            continue  # caches hold what they like beyond the valid rows
        if a.shape != b.shape or not np.isfinite(a).all():
            yield name, float("inf")
        else:
            yield name, float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-12))
