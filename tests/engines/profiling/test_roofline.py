"""Floors by hand: what each stage computes and moves, over a machine's peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgevlm.calibration import static_plan, weight_only
from edgevlm.calibration.samples import Settings
from edgevlm.engines.backends import Peaks
from edgevlm.engines.profiling.roofline import (
    Bound,
    Work,
    floors_of_devices,
    question,
    roofline,
)
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.systems import find, presets
from edgevlm.toolkit.target import parse
from edgevlm.toolkit.vlm.config import ModelConfig

FLOAT = PrecisionPlan()
PEAKS = Peaks(gflop_s=400.0, int8_gop_s=1600.0, gb_s=50.0)
# Qwen2.5-0.5B: 24 layers of 896 channels, 2 heads of keys and values with 64 channels.
MODEL = "llava-qwen2-0.5b"
PARAMETERS, TABLE, NORMS = 494_032_768, 151_936 * 896, 49 * 896
BIASES = 24 * (896 + 128 + 128)
KV_ROW = 2 * 24 * 2 * 64  # keys and values of one token in all layers


def preset(name: str) -> ModelConfig:
    return find(presets()[name]).PRESETS[name]()


def bounds(
    work: Work,
    *,
    plan: PrecisionPlan = FLOAT,
    peaks: Peaks = PEAKS,
    size: int = 4,
    measured: dict[str, float] | None = None,
    name: str = MODEL,
) -> dict[str, Bound]:
    found = roofline(preset(name), plan, peaks, work, measured or {}, size)
    assert (found.peak_gflop_s, found.peak_gb_s) == (peaks.gflop_s, peaks.gb_s)
    return {bound.stage: bound for bound in found.stages}


@pytest.mark.parametrize("size", [4, 2, 10**6])  # the last one shows a single row
@pytest.mark.parametrize("prompt", [608, 100_000])
def test_a_token_moves_every_weight_and_the_cache(prompt: int, size: int) -> None:
    decode = bounds(Work(1, 576, prompt), size=size)["decode"]
    cache = KV_ROW * (prompt + 1) + KV_ROW  # it reads the prompt's rows and its own, writes one
    others = 896 + 24 * 64  # its row of the table, and the rotary rows of each layer
    assert decode.kv_gbytes == round(size * cache / 1e9, 3)
    assert decode.gbytes == round(size * (PARAMETERS + others + cache) / 1e9, 3)
    assert decode.floor_ms == pytest.approx(1000 * decode.gbytes / PEAKS.gb_s, abs=0.02)
    assert decode.limited_by == "memory"


def test_products_in_fp8_run_at_their_own_rate_or_that_of_floats() -> None:
    plan = static_plan.plan_of(preset(MODEL), Settings("fp8"))
    work = Work(1, 576, 608)
    slow = bounds(work, peaks=Peaks(1.0, 1e9, 1e9), plan=plan)["prefill"]
    fast = bounds(work, peaks=Peaks(1.0, 1e9, 1e9, 1e9), plan=plan)["prefill"]
    floats = bounds(work, peaks=Peaks(1.0, 1.0, 1e9))["prefill"]
    assert slow.gflops == fast.gflops == floats.gflops
    assert slow.floor_ms == pytest.approx(floats.floor_ms, rel=0.01)
    assert fast.floor_ms < 0.2 * floats.floor_ms


def test_floors_of_devices_count_static_formats_at_their_rates() -> None:
    model, target = preset(MODEL), parse("h100")
    plans = {to: static_plan.plan_of(model, Settings(to)) for to in ("fp8", "int8-static")}
    found = {n: floors_of_devices(model, p, target, "fp16")["h100"] for n, p in plans.items()}
    whole = floors_of_devices(model, PrecisionPlan(), target, "fp16")["h100"]
    assert found["fp8"].peak_fp8_gflop_s == found["int8-static"].peak_int8_gop_s == 1_979_000
    for floor in found.values():
        assert floor.time_to_first_token_ms < 0.8 * whole.time_to_first_token_ms


def test_only_products_with_weights_in_few_bits_run_at_the_rate_of_8_bits() -> None:
    """What is left of a token in float: norms, biases, activations, attention over the cache."""
    peaks = Peaks(gflop_s=1.0, int8_gop_s=1e9, gb_s=1e9)
    decode = bounds(Work(1, 576, 608), peaks=peaks, plan=weight_only.plan("int8"))["decode"]
    attention = 24 * 609 * (4 * 896 + 6 * 14) / 1e9
    assert attention < decode.floor_ms / 1000 < 1.05 * attention
    assert decode.gflops > 2 * (PARAMETERS - NORMS - BIASES) / 1e9


def test_a_prompt_writes_the_cache_and_reads_it_back() -> None:
    prefill = bounds(Work(1, 576, 50_000))["prefill"]
    assert prefill.kv_gbytes == round(4 * 2 * KV_ROW * 50_000 / 1e9, 3)
    assert prefill.gflops > 2 * 50_000 * (PARAMETERS - TABLE) * 23 / 24 / 1e9
    assert prefill.limited_by == "arithmetic"
    assert prefill.floor_ms == pytest.approx(1000 * prefill.gflops / PEAKS.gflop_s, rel=1e-4)


def test_encoders_and_mergers_have_no_cache() -> None:
    found = bounds(Work(1, 576, 608))
    assert set(found) == {"encoder.clip", "merger", "prefill", "decode"}
    assert found["encoder.clip"].kv_gbytes == found["merger"].kv_gbytes == 0
    assert found["encoder.clip"].gbytes == round(4 * 290_909_184 / 1e9, 3)


def test_views_are_calls_of_the_encoder() -> None:
    one, five = (
        bounds(Work(views, 576, 608), name="llava-next-0.5b")["encoder.clip"] for views in (1, 5)
    )
    assert five.gflops == pytest.approx(5 * one.gflops, abs=0.01)
    assert five.gbytes == pytest.approx(5 * one.gbytes, abs=0.01)


def test_weights_in_few_bits_are_read_in_few_bits_and_multiplied_in_eight() -> None:
    work = Work(1, 576, 608)
    found = bounds(work, plan=weight_only.plan("int8"))
    whole, decode = bounds(work)["prefill"], found["decode"]
    floats = NORMS + BIASES + 24 * 64 + KV_ROW * 610
    in_8_bits = PARAMETERS + 896 - NORMS - BIASES
    nbytes = in_8_bits * (1 + 4 / 128) + 4 * floats  # a float32 scale per 128 weights
    assert decode.gbytes == round(nbytes / 1e9, 3)
    quick = found["prefill"]
    assert quick.gflops == whole.gflops
    products = 2 * (24 * 608 * (PARAMETERS - TABLE) / 24 + TABLE) / 1e9
    assert quick.floor_ms > 1000 * products * 0.9 / PEAKS.int8_gop_s
    assert quick.floor_ms < 0.4 * whole.floor_ms


def test_four_bits_are_read_in_four_where_the_plan_has_them() -> None:
    work = Work(1, 576, 608)
    decode = bounds(work, plan=weight_only.plan("int4"))["decode"]
    layers = PARAMETERS - TABLE - NORMS - BIASES
    floats = NORMS + BIASES + 24 * 64 + KV_ROW * 610
    nbytes = layers * (0.5 + 4 / 128) + (TABLE + 896) * (1 + 4 / 128) + 4 * floats
    assert decode.gbytes == round(nbytes / 1e9, 3)


@pytest.mark.parametrize(
    ("peaks", "limit"),
    [(replace(PEAKS, gb_s=1e9), "arithmetic"), (replace(PEAKS, gflop_s=1e9), "memory")],
)
def test_the_slower_of_the_two_limits(peaks: Peaks, limit: str) -> None:
    for bound in bounds(Work(1, 576, 608), peaks=peaks).values():
        assert bound.limited_by == limit, bound.stage
        rate = peaks.gflop_s if limit == "arithmetic" else peaks.gb_s
        amount = bound.gflops if limit == "arithmetic" else bound.gbytes
        assert bound.floor_ms == pytest.approx(1000 * amount / rate, rel=0.01, abs=0.02)


def test_what_is_reached_is_the_floor_over_the_median() -> None:
    floor = bounds(Work(1, 576, 608))["decode"].floor_ms
    found = bounds(Work(1, 576, 608), measured={"decode": 4 * floor})
    assert found["decode"].reached == 0.25
    assert found["prefill"].reached == 0  # not measured


def test_a_question_is_one_image_and_some_text() -> None:
    assert question(preset(MODEL)) == Work(1, 576, 608)
    assert question(preset(MODEL), text=100).prompt_tokens == 676
    tiled = question(preset("llava-next-0.5b"), size=(640, 480))
    assert tiled.views > 1
    assert tiled.prompt_tokens == tiled.image_tokens + 32
