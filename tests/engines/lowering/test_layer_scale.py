"""A scale of each output behind an integer product goes into the product's steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.engines.lowering.lower import lower
from edgevlm.toolkit.target import this_cpu
from tests.engines.build.test_row_quantized import stored
from tests.toolkit.models.test_architectures import component, tensors


@pytest.mark.parametrize(("kind", "scales"), [("convnext", 4), ("dinov2", 6)])
def test_no_pass_over_the_outputs_is_left_of_it(kind: str, scales: int, tmp_path: Path) -> None:
    """That results stay right is tested with every architecture."""
    part = component("encoders", kind)
    model = stored(part, tensors(part), tmp_path)
    gains = {
        name
        for node in model.graph.node
        if node.op_type == "Mul"
        for name in node.input
        if name in part.shapes
    }
    assert len(gains) == scales
    stays = {
        (node.op_type, other)
        for node in lower(model, this_cpu()).graph.node
        if gains & {*node.input}
        for other in node.input
        if other not in gains
    }
    assert {kind for kind, _ in stays} == {"Mul"}
    assert all(other.endswith((".bias", ".int8_channels.scale")) for _, other in stays)
    assert len(stays) == 2 * scales


def test_the_kernels_names_stay_unique(tmp_path: Path) -> None:
    part = component("encoders", "convnext")
    names = [n.name for n in lower(stored(part, tensors(part), tmp_path), this_cpu()).graph.node]
    assert len(names) == len({*names})
