"""Weights in 8 and 4 bits: rounding, packing, and how other readers decode the bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import Bits

BITS: tuple[Bits, ...] = (8, 4)


@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 99), inputs=st.sampled_from([16, 48, 96, 256]), scale=st.floats(1e-6, 1e6)
)
def test_no_weight_moves_by_more_than_half_a_step(
    bits: Bits, seed: int, inputs: int, scale: float
) -> None:
    rows = np.random.default_rng(seed).standard_normal((5, inputs)).astype(np.float32) * scale
    stored, scales = blockwise.quantize(rows.astype(np.float32), bits)
    found = blockwise.dequantize(stored, scales, bits)
    block = blockwise.block_of(inputs)
    assert block is not None
    assert scales.shape == (5, inputs // block)
    assert stored.nbytes == rows.size * bits // 8
    steps = np.abs(np.repeat(scales, block, 1))
    # At 4 bits the range ends one step earlier above zero: there a value may move by a whole one.
    most = steps * (0.5 if bits == 8 else 1.0)
    assert (np.abs(found - rows) <= most * 1.0001).all()
    assert np.abs(found - rows).mean() < 0.3 * steps.mean()


@pytest.mark.parametrize("bits", BITS)
def test_rounding_again_changes_nothing(bits: Bits) -> None:
    rows = np.random.default_rng(1).standard_normal((7, 128)).astype(np.float32)
    once = blockwise.dequantize(*blockwise.quantize(rows, bits), bits)
    twice = blockwise.dequantize(*blockwise.quantize(once, bits), bits)
    np.testing.assert_allclose(twice, once, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits: Bits) -> None:
    found = blockwise.dequantize(*blockwise.quantize(np.zeros((2, 32), np.float32), bits), bits)
    assert not found.any()


def test_pairs_are_packed_as_onnx_packs_them() -> None:
    codes = np.random.default_rng(2).integers(0, 16, (3, 32)).astype(np.uint8)
    tensor = helper.make_tensor(
        "x", TensorProto.UINT4, (3, 32), blockwise.pack(codes).tobytes(), True
    )
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.uint8), codes)
    assert np.array_equal(blockwise.unpack(blockwise.pack(codes)), codes)


def test_the_block_divides_the_inputs() -> None:
    assert [blockwise.block_of(n) for n in (4864, 1664, 96, 48, 72)] == [128, 128, 32, 16, None]
    with pytest.raises(ValueError, match="72 inputs"):
        blockwise.quantize(np.ones((1, 72), np.float32), 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scales", [False, True])
def test_pieces_joined_are_the_whole(
    bits: Bits, scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(3).standard_normal((10, 64)).astype(np.float32)
    whole = blockwise.quantize(rows, bits)[int(scales)]
    monkeypatch.setattr(blockwise, "PIECE", 3 * 64)
    parts = list(blockwise.pieces(rows, bits, scales=scales))
    assert [len(p) for p in parts] == [3, 3, 3, 1]
    assert np.array_equal(np.concatenate(parts), whole)
