"""Bicubic resizing of position tables is torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.toolkit.images.resize import bicubic
from edgevlm.toolkit.ops.vocabulary import Array

SIDE = st.integers(2, 20)  # torch 2.13 repeats a row of maps that are one column wide


def theirs(table: Array, size: tuple[int, int], *, antialias: bool) -> Array:
    image = torch.from_numpy(table).permute(2, 0, 1)[None].contiguous()
    found = torch.nn.functional.interpolate(
        image, size, mode="bicubic", align_corners=False, antialias=antialias
    )
    result: Array = found[0].permute(1, 2, 0).numpy()
    return result


@pytest.mark.parametrize("antialias", [False, True])
@settings(deadline=None, max_examples=80, derandomize=True)
@given(have=st.tuples(SIDE, SIDE), wanted=st.tuples(SIDE, SIDE))
def test_any_size_to_any_size(
    antialias: bool, have: tuple[int, int], wanted: tuple[int, int]
) -> None:
    table = np.random.default_rng(sum(have)).normal(size=(*have, 3)).astype(np.float32)
    found = bicubic(table, wanted, antialias=antialias)
    assert found.dtype == np.float32
    assert found.shape == (*wanted, 3)
    np.testing.assert_allclose(found, theirs(table, wanted, antialias=antialias), atol=2e-5)


def test_the_same_size_changes_nothing() -> None:
    table = np.random.default_rng(0).normal(size=(5, 7, 2)).astype(np.float32)
    np.testing.assert_array_equal(bicubic(table, (5, 7), antialias=False), table)
