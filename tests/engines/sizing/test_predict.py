"""`edgevlm plan`: predictions follow from shapes, rates and memory as they are stated."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import sizing_page
from benchmarks.common import RESULTS
from edgevlm.engines.backends import Peaks
from edgevlm.engines.runtime import memory
from edgevlm.engines.sizing import rates, work
from edgevlm.engines.sizing.predict import Asked, Format, Planner
from edgevlm.toolkit import systems
from edgevlm.toolkit.ops.costs import COSTS, Cost
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import DEVICES, Target, has_fp8
from edgevlm.toolkit.vlm.config import ModelConfig
from tests.refusals import check_contract, edgevlm

PRESET = "preset:llava-qwen2-0.5b"
ALL = dict.fromkeys(rates.FORMATS, 1.0)
# At these rates a second is a GFLOP or a GB.
IDEAL = rates.Efficiency(ALL, ALL, ALL, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0)
UNIT = rates.Machine(
    "unit", Target("onnxruntime", (), "x86_64"), Peaks(1, 1, 1), 10**10, IDEAL, True
)


def model(name: str = "llava-qwen2-0.5b") -> ModelConfig:
    return systems.find(systems.presets()[name]).PRESETS[name]()


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(model(), Asked(1024))


def planned(*words: object) -> list[dict[str, Any]]:
    ran = edgevlm("plan", *words, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["kind"] == "plan"
    plans: list[dict[str, Any]] = found["plans"]
    return plans


def test_an_op_takes_the_longer_of_arithmetic_and_traffic() -> None:
    linear = Cost(
        op="linear",
        path="lm/x",
        flops=2 * 10**9,
        weight_elements=10**8,
        matrix_elements=10**8,
        matrix_inputs=10**4,
        written_elements=10**5,
    )
    times = work.stages([work.Call("one", 3, (linear,))], {"": PrecisionPlan()}, 4, UNIT)
    assert times["one"].seconds == pytest.approx(6.0)  # 2 GFLOP against 0.4 GB, three times
    assert times["one"].limited_by == "arithmetic"
    slow = replace(UNIT, peaks=Peaks(100, 100, 1))
    times = work.stages([work.Call("one", 1, (linear,))], {"": PrecisionPlan()}, 4, slow)
    assert times["one"].seconds == pytest.approx(0.4)
    assert times["one"].limited_by == "memory"
    coded = PrecisionPlan("int8_rows")
    times = work.stages([work.Call("one", 1, (linear,))], {"": coded}, 4, slow)
    assert times["one"].seconds == pytest.approx(0.1, rel=0.01)  # a byte a weight, and scales


def test_the_work_is_that_of_the_roofline(planner: Planner) -> None:
    """The same FLOPs as a profile counts; more traffic, as every piece reads the weights."""
    from edgevlm.engines.profiling.roofline import question, roofline

    asked = question(model())
    bounds = roofline(model(), PrecisionPlan(), Peaks(1, 1, 1), asked, {}, 4).stages
    counted: dict[str, float] = {}
    for call in work.calls(model(), asked, 1):
        gflops = call.times * sum(cost.flops for cost in call.costs) / 1e9
        counted[call.stage] = counted.get(call.stage, 0.0) + gflops
    for bound in bounds:
        assert counted[bound.stage] == pytest.approx(bound.gflops, rel=0.02), bound.stage


def test_memory_is_what_a_build_estimates(planner: Planner) -> None:
    shapes = model()
    found = planner.predict(Format("fp32", "fp32"), UNIT)
    weights = memory.weights_bytes(shapes, PrecisionPlan(), 4)
    expected = memory.of_model(shapes, weights, 1024, 4)
    assert found.total_bytes == expected.total_bytes
    assert found.cache_bytes == 24 * 2 * 2 * 64 * 1024 * 4  # layers, k and v, heads, channels


@pytest.mark.parametrize("share", [0.5, 0.9, 1.1])
def test_the_largest_context_is_the_largest_that_fits(planner: Planner, share: float) -> None:
    shapes = model()
    weights = memory.weights_bytes(shapes, PrecisionPlan(), 4)
    whole = memory.of_model(shapes, weights, 8192, 4).total_bytes
    machine = replace(UNIT, memory_bytes=round(weights + share * (whole - weights)))
    found = planner.predict(Format("fp32", "fp32"), machine)

    def needed(context: int) -> int:
        return memory.of_model(shapes, weights, context, 4).total_bytes

    assert needed(found.largest_context) <= machine.memory_bytes
    assert needed(found.largest_context + 256) > machine.memory_bytes
    assert found.fits is (needed(1024) <= machine.memory_bytes)


def test_tiles_shrink_with_memory_and_context() -> None:
    tiled = model("mlcd-embodied-0.5b")
    roomy = Planner(tiled, Asked(8192)).predict(Format("fp32", "fp32"), UNIT)
    short = Planner(tiled, Asked(3200)).predict(Format("fp32", "fp32"), UNIT)
    tight = Planner(tiled, Asked(8192)).predict(
        Format("fp32", "fp32"), replace(UNIT, memory_bytes=roomy.weights_bytes)
    )
    assert roomy.largest_tiles is not None
    assert short.largest_tiles is not None
    assert roomy.largest_tiles > short.largest_tiles > 0
    assert tight.largest_tiles == 0
    assert Planner(model(), Asked(1024)).predict(Format("fp32", "fp32"), UNIT).largest_tiles is None


def test_sampling_has_a_rate_of_its_own() -> None:
    """MMFuser's merger gathers: half of its time on a processor (81.7 ms measured, with 39.9 ms of
    products, norms and the rest).
    """
    planner = Planner(model("mmfuser-0.5b"), Asked(4096))
    slow = replace(UNIT, efficiency=replace(IDEAL, sampling=0.5))
    given = Format("fp32", "fp32")
    ideal, halved = (planner.stages(given, m)["merger"].seconds for m in (UNIT, slow))
    assert halved - ideal == pytest.approx(0.1222, rel=0.01)  # 10^9 operations, at 1 and at 0.5
    encoders = [planner.stages(given, m)["encoder.clip"].seconds for m in (UNIT, slow)]
    assert encoders[0] == encoders[1]


def test_codes_are_faster_to_read_than_floats() -> None:
    found = {
        p["precision"]: p
        for p in planned(PRESET, "--target", "h100", "--precision", "fp16,int8,int4")
    }
    rates_of = [p["output_token_throughput_per_user"] for p in found.values()]
    sizes = [p["weights_bytes"] for p in found.values()]
    assert rates_of == sorted(rates_of)
    assert sizes == sorted(sizes, reverse=True)
    assert found["fp16"]["weights_bytes"] == pytest.approx(1.6e9, rel=0.02)


def test_what_a_release_does_counts() -> None:
    """TensorRT 10.3 keeps the cache twice; RTX the float weights of the language model."""
    nano, orin, rtx = planned(
        PRESET, "--target", "jetson-orin-nano,jetson-agx-orin,rtx-4090", "--precision", "fp16"
    )
    assert nano["cache_bytes"] == 2 * orin["cache_bytes"]
    assert rtx["weights_bytes"] > 1.4 * orin["weights_bytes"]
    assert any("twice" in note for note in nano["notes"])


def test_a_target_stands_for_all_its_devices() -> None:
    found = planned(PRESET, "--target", "tensorrt@11.1/sm_90", "--precision", "int8-static")
    assert [p["device"] for p in found] == ["h100", "h200"]
    fp8, int8 = planned(
        PRESET, "--target", "rtx-4090", "--precision", "fp8,int8-static", "--max-context", 1024
    )
    assert fp8["weights_bytes"] < int8["weights_bytes"]  # a step for a weight, not for an output
    assert fp8["time_to_first_token_ms"] > int8["time_to_first_token_ms"]  # at half the rate there
    every = planned(PRESET, "--target", "all", "--precision", "fp8")
    without = {p["device"] for p in every if any("has no FP8" in note for note in p["notes"])}
    assert without == {"jetson-orin-nano", "jetson-agx-orin", "a100"}
    every = planned(PRESET, "--target", "all", "--precision", "int4")
    assert [p["device"] for p in every] == list(DEVICES)


@pytest.mark.parametrize(
    ("device", "precision", "told"),
    [
        ("a100", "fp8", "a100: sm_80 has no FP8"),
        ("jetson-agx-orin", "fp8", "jetson-agx-orin: sm_87 has no FP8"),
        ("tensorrt-rtx@1.7/sm_86+sm_89", "fp8", "rtx-laptop: sm_86 has no FP8"),
        ("onnxruntime-cuda@1.31.1/sm_90", "fp8", "h100: ONNX Runtime multiplies no inputs in 8"),
        ("onnxruntime-cuda@1.31.1/sm_80", "int8-static", "a100: ONNX Runtime multiplies no inputs"),
    ],
)
def test_a_format_that_a_named_device_lacks_is_refused(
    device: str, precision: str, told: str
) -> None:
    ran = edgevlm("plan", PRESET, "--target", device, "--precision", precision)
    check_contract(ran.err)
    assert told in ran.err
    assert ("l4" if device in ("a100", "jetson-agx-orin") else "rtx-4090") in ran.err


@pytest.mark.parametrize(
    ("device", "of_int8"), [("h100", 1.0), ("l4", 1.0), ("jetson-thor", 1.0), ("rtx-4090", 0.5)]
)
def test_fp8_has_twice_the_rate_of_fp16(device: str, of_int8: float) -> None:
    """That of INT8, but on GeForce, whose sums in float32 take twice the time."""
    (machine,) = rates.machines(DEVICES[device].target, device, "fp16")
    peaks = machine.peaks
    assert peaks.fp8_gflop_s == pytest.approx(2 * peaks.gflop_s, rel=0.01)
    assert peaks.fp8_gflop_s == pytest.approx(of_int8 * peaks.int8_gop_s, rel=0.01)
    share = machine.efficiency.products["fp8"]
    assert rates.product_rate(machine, "fp8", 600) == share * peaks.fp8_gflop_s


def test_devices_that_have_fp8_have_a_peak_of_it() -> None:
    for name, device in DEVICES.items():
        assert has_fp8(device.target.arch) == ("fp8" in device.peak_tops), name


def test_this_processor_is_measured() -> None:
    pytest.importorskip("onnxruntime")
    fp32, int4 = planned(
        PRESET, "--target", "cpu", "--precision", "fp32,int4", "--max-context", 1024
    )
    assert fp32["peaks_measured"]
    assert fp32["inter_token_latency_ms"] > int4["inter_token_latency_ms"] > 0
    assert 1e8 < fp32["memory_bytes"] < 1e13
    assert any("second form" in note for note in int4["notes"])


def test_every_kind_of_attention_has_its_rate() -> None:
    kinds = {op for op in COSTS if "attention" in op or "attn" in op}
    assert kinds == set(work._ATTENTION)


def test_masks_are_behind_the_first_token() -> None:
    """SAM's encoder sees one image, whatever the views of the tower, and only behind an answer."""
    from edgevlm.engines.profiling.roofline import question

    shapes = model("mlcd-seg-0.5b")
    planner = Planner(shapes, Asked(8192))
    found = planner.predict(Format("fp32", "fp32"), UNIT)
    plain = Planner(model("mlcd-embodied-0.5b"), Asked(8192)).predict(Format("fp32", "fp32"), UNIT)
    assert found.time_to_first_token_ms == pytest.approx(plain.time_to_first_token_ms, rel=1e-3)
    assert plain.mask_ms is None
    assert found.mask_ms is not None
    calls = {c.stage: c for c in work.calls(shapes, question(shapes), 1)}
    flops = sum(cost.flops for cost in calls["segmenter.encoder"].costs)
    assert calls["segmenter.encoder"].times == 1
    assert 5.0e12 < flops < 6.0e12  # SAM ViT-H at 1024 pixels
    assert found.mask_ms > flops / 1e6


def test_a_tower_has_images_a_second() -> None:
    found = planned("preset:clip-l14-336", "--target", "h100,jetson-orin-nano", "--precision",
                    "fp16,int8-static,int4")  # fmt: skip
    assert [p["device"] for p in found] == ["h100"] * 3 + ["jetson-orin-nano"] * 3
    for p in found:
        assert p["fits"]
        assert p["limited_by"] in ("arithmetic", "memory", "starting ops")
        assert p["images_per_s"] >= 0.99 * 1000 / p["image_ms"]  # batches are no slower
    sizes = [p["weights_bytes"] for p in found[:3]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(2 * 304e6, rel=0.01)
    assert found[0]["images_per_s"] > 10 * found[3]["images_per_s"]
    assert not any("KV cache" in note for p in found for note in p["notes"])


def test_memory_of_a_tower_is_what_embedding_asks_for() -> None:
    from edgevlm.engines.sizing.towers import TowerPlanner
    from edgevlm.toolkit.vlm.tower_presets import PRESETS

    shapes = PRESETS["unicom-l14-336"]
    found = TowerPlanner(shapes).predict(Format("fp32", "fp32"), UNIT)
    weights = memory.weights_bytes(shapes, PrecisionPlan(), 4)
    assert found.batch == memory.images_together(shapes, UNIT.target, 4)
    expected = memory.of_model(shapes, weights, 0, 4, found.batch)
    assert found.total_bytes == expected.total_bytes
    tight = replace(UNIT, memory_bytes=memory.of_model(shapes, weights, 0, 4, 3).total_bytes)
    assert TowerPlanner(shapes).predict(Format("fp32", "fp32"), tight).largest_batch == 3
    none = replace(UNIT, memory_bytes=weights)
    assert TowerPlanner(shapes).predict(Format("fp32", "fp32"), none).largest_batch == 0


def test_a_tower_s_plan_in_words_and_what_it_refuses() -> None:
    ran = edgevlm("plan", "preset:unicom-b32", "--target", "l4,orin", "--quiet")
    assert ran.code == 1
    ran = edgevlm("plan", "preset:unicom-b32", "--target", "l4,jetson-agx-orin")
    assert ran.code == 0, ran.err
    assert "embeddings of 512 channels" in ran.out
    assert "images/s" in ran.out
    for words in (("--max-context", 64), ("--image-size", "64x64"), ("--prompt-tokens", 3)):
        ran = edgevlm("plan", "preset:unicom-b32", "--target", "l4", *words)
        assert ran.code == 1
        assert f"{words[0]} is for models with a language model" in check_contract(ran.err)[0]


REFUSED = {
    "no such target": (("--target", "h1000"), "h1000"),
    "no figures": (("--target", "tensorrt@11.1/sm_70"), "sm_70"),
    "no such precision": (("--target", "h100", "--precision", "int3"), "int3"),
    "a context beyond the model's": (("--target", "h100", "--max-context", 99999), "99999"),
    "a question beyond the context": (("--target", "h100", "--max-context", 600), "600"),
    "an answer without tokens": (("--target", "h100", "--max-tokens", 0), "--max-tokens 0"),
    "a size that is none": (("--target", "h100", "--image-size", "640"), "640"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    words, named = REFUSED[case]
    ran = edgevlm("plan", PRESET, *words)
    assert ran.code == 1
    assert named in check_contract(ran.err)[0]


def test_the_page_is_current() -> None:
    page = sizing_page.PAGE.read_text(encoding="utf-8")
    for part in (sizing_page.HEAD, sizing_page.devices(), sizing_page.checked()):
        assert part in page
    assert sizing_page.section("llava-qwen2-0.5b") in page
    assert [name for name in sizing_page.PRESETS if f"\n## {name}\n" not in page] == []
    assert f"### unicom-b32\n\n{sizing_page._tower('unicom-b32')}" in page
    assert [name for name in sizing_page.TOWERS if f"\n### {name}\n" not in page] == []
    assert "One mask behind the answer" in page
    assert set(sizing_page.SOURCES) == set(DEVICES)


def test_predictions_were_within_a_quarter_of_measurements() -> None:
    data = json.loads((RESULTS / "sizing.json").read_text())
    assert len(data["measured"]) >= 3
    for name, found in data["measured"].items():
        for key in ("first", "decode"):
            ratio = found["predicted_ms"][key] / found["measured_ms"][key]
            assert 0.75 < ratio < 1.25, (name, key)
