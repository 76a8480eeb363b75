"""Costs of whole systems: axes and views, published sizes, weights files and the KV cache."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from edgevlm.calibration import static_plan, weight_only
from edgevlm.calibration.samples import Settings
from edgevlm.export.write import record
from edgevlm.toolkit.ops.costs import Cost
from edgevlm.toolkit.ops.wrappers import Count
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.systems import find, presets
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig
from edgevlm.toolkit.vlm.cost import (
    count,
    image_axes,
    read_bytes,
    state_elements,
    stored_bytes,
    weight_bits,
)
from tests.toolkit.models.test_architectures import FILES, LMS, component, feed

FLOAT = PrecisionPlan()


def preset(name: str) -> ModelConfig:
    return find(presets()[name]).PRESETS[name]()


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("convllava-7b-768", 768, 144),
        ("convllava-7b-1024", 1024, 256),
        ("convllava-7b-1536", 1536, 576),
    ],
)
def test_tokens_of_a_convnext_follow_from_its_pixels(name: str, size: int, tokens: int) -> None:
    axes = image_axes(preset(name), 1, tokens)
    assert (axes["height"], axes["width"], axes["tokens"]) == (size, size, tokens)


@pytest.mark.parametrize("name", presets())
def test_every_component_of_every_preset_can_be_counted(name: str) -> None:
    model = preset(name)
    axes = image_axes(model, 1, 16) | {"context": 32, "sequence": 32}
    for part in components.components(model):
        assert count(part, axes).flops > 0, part.name


def test_views_cost_each_as_much() -> None:
    model = preset("llava-next-7b")
    merger = next(p for p in components.components(model) if p.name == "merger")
    one, two, five = (count(merger, image_axes(model, n, 16)).flops for n in (1, 2, 5))
    assert five - two == 3 * (two - one) > 0


def language_model(name: str) -> Component:
    return components.components(preset(name))[-1]


def decoded(part: Component, length: int, *, batch: int = 1) -> Count:
    """One token of each row of the batch, the last of `length`."""
    axes = {"batch": batch, "rows": 1, "scored": 1, "sequence": 1, "context": length}
    return count(part, axes)


def test_a_vision_tower_costs_what_is_published() -> None:
    """CLIP ViT-L/14 at 336: 577 tokens, 23 of 24 blocks of 12 x width^2 products."""
    model = preset("llava-1.5-7b")
    encoder = components.components(model)[0]
    flops = count(encoder, image_axes(model, 1, 576)).flops
    blocks = 23 * 577 * 2 * (12 * 1024 * 1024 + 2 * 577 * 1024)
    assert blocks < flops < 1.02 * blocks


def test_an_encoder_and_its_merger_cost_what_was_measured_elsewhere() -> None:
    """CLIP-L/14-336 up to block 23 with the MLP of a Qwen2.5-0.5B: about 0.38 TFLOP."""
    model = preset("llava-qwen2-0.5b")
    axes = image_axes(model, 1, 576)
    encoder, merger, _ = components.components(model)
    total = count(encoder, axes).flops + count(merger, axes).flops
    products = 576 * 2 * (1024 * 896 + 896 * 896)
    assert count(merger, axes).flops == pytest.approx(products, rel=0.01)
    assert total == pytest.approx(0.38e12, rel=0.04)


def test_a_whole_vision_tower_has_the_published_parameters() -> None:
    """openai/clip-vit-large-patch14-336: 303,507,456, with a last norm of 2 x 1,024 that no
    hidden state needs.
    """
    config = replace(preset("llava-1.5-7b").encoders[0].config, taps=(24,))
    tower = components.encoder_component(ComponentConfig("clip", "clip", config))
    axes = {"tiles": 3, "height": 336, "width": 336}
    read = sum(cost.weight_elements for cost in count(tower, axes).costs)
    assert read == 303_507_456 - 2 * 1024


@pytest.mark.parametrize(
    ("name", "parameters"), [("llava-qwen2-0.5b", 494_032_768), ("llava-1.5-7b", 6_738_415_616)]
)
def test_a_language_model_has_the_published_parameters(name: str, parameters: int) -> None:
    """Qwen2.5-0.5B, whose table is its output layer too, and Llama-2-7B, which has both."""
    part = language_model(name)
    held = stored_bytes(preset(name), FLOAT, 2)["lm"]
    table = part.shapes["embed.weight"]
    c = preset(name).lm.config
    rotary = 2 * c.context * c.head_dim // 2
    assert held == 2 * parameters + 4 * rotary
    read = sum(cost.weight_elements for cost in decoded(part, 100).costs)
    angles = c.num_layers * c.head_dim  # a row of cosines and one of sines in each layer
    other = 0 if c.tied else math.prod(table)  # of which a token reads one row
    assert read == parameters - other + table[1] + angles


def test_a_prompt_costs_what_was_measured_elsewhere() -> None:
    """Qwen2.5-0.5B, 608 positions, logits for the last one: about 0.44 TFLOP."""
    part = language_model("llava-qwen2-0.5b")
    axes = {"batch": 1, "rows": 576, "scored": 1, "sequence": 608, "context": 608}
    flops = count(part, axes).flops
    layer = 896 * (896 + 128 + 128 + 896 + 3 * 4864)  # q, k, v, out; gate, up, down
    last = 896 * (896 + 3 * 4864)  # not needed of the other 607 tokens in the last layer
    products = 2 * (24 * 608 * layer - 607 * last + 896 * 151_936)
    attention = 24 * 4 * 896 * 608 * 609 // 2
    assert products + attention < flops < 1.02 * (products + attention)
    assert flops == pytest.approx(0.44e12, rel=0.02)


@pytest.mark.parametrize(("batch", "length"), [(1, 608), (1, 2049), (5, 333)])
def test_a_token_reads_the_cache_up_to_its_length(batch: int, length: int) -> None:
    part = language_model("llava-qwen2-0.5b")
    costs = decoded(part, length, batch=batch).costs
    layers, kv_heads, head_dim = 24, 2, 64
    row = 2 * layers * kv_heads * head_dim * batch
    assert sum(c.kv_read_elements for c in costs) == row * length
    assert sum(c.kv_written_elements for c in costs) == row
    assert state_elements(part, {"batch": batch, "context": length}) == row * length


@pytest.mark.parametrize("kind", LMS)
def test_states_are_the_arrays_that_a_decoder_carries(kind: str) -> None:
    part = component("lms", kind)
    carried = {k: v for k, v in feed(part).items() if k.startswith("past.")}
    axes = {"batch": 1, "context": 12}
    assert 4 * state_elements(part, axes) == sum(v.nbytes for v in carried.values()) > 0


@pytest.mark.parametrize(("folder", "kind"), [f for f in FILES if f[0] != "lms"])
def test_every_parameter_is_read_once(folder: str, kind: str) -> None:
    """Of encoders and mergers, whatever the batch; tables of points are not parameters."""
    part = component(folder, kind)
    axes = {"height": 40, "width": 56, "tokens": 4, "tiles": 3, "rows": 5, "masks": 3}
    counter = count(part, axes)
    views = {"softmax", "mul", "slice"}  # scales of levels are read by several ops
    if kind in ("sam", "sam_decoder"):  # biases pad windows, positions are added in every layer
        views |= {"add"}
    read = sum(c.weight_elements for c in counter.costs if c.op != "ms_deform_attn")
    tables = sum(table.size for table in counter.tables.values())
    total = sum(math.prod(shape) for shape in part.shapes.values()) + tables
    loose = sum(c.weight_elements for c in counter.costs if c.op in views)
    assert total <= read <= total + loose


PLANS = {
    "fp32": FLOAT,
    **{kind: weight_only.plan(kind) for kind in (*weight_only.KINDS, weight_only.ROWS)},
}


@pytest.mark.parametrize("precision", PLANS)
@pytest.mark.parametrize("name", presets())
def test_weights_are_what_the_recorder_writes(name: str, precision: str) -> None:
    model, plan = preset(name), PLANS[precision]
    written = {p.name: record(p, "fp32", plan).nbytes() for p in components.components(model)}
    assert stored_bytes(model, plan, 4) == written


@pytest.mark.parametrize("name", ["comm-7b", "convllava-7b-768", "mmfuser-7b", "llava-qwen2-0.5b"])
@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [("int8-static", "fp32", 4), ("int8-static", "fp16", 2), ("fp8", "fp16", 2)],
)
def test_static_weights_are_what_the_recorder_writes(
    name: str, kind: str, dtype: str, size: int
) -> None:
    model = preset(name)
    plan = static_plan.plan_of(model, Settings(kind))
    plan = replace(plan, ranges=dict.fromkeys(static_plan.layers_of(model).flops, 1.0))
    written = {p.name: record(p, dtype, plan).nbytes() for p in components.components(model)}
    assert stored_bytes(model, plan, size) == written
    counter = count(components.components(model)[0], image_axes(model, 1, 1))
    kinds = {c.op for c in counter.costs if weight_bits(c, plan) == 8}
    assert kinds == {"linear", "conv"}
    assert not any(
        weight_bits(c, weight_only.plan("int8")) for c in counter.costs if c.op == "conv"
    )


def test_a_matrix_in_few_bits_is_read_with_its_scales_and_the_rest_in_float() -> None:
    cost = Cost("linear", "lm/layers.0/mlp/up", 0, 64 * 32 + 32, 64 * 32, 64)
    assert read_bytes(cost, FLOAT, 2) == 2 * (64 * 32 + 32)
    for kind, bits in (("int8_weights", 8), ("int4_weights", 4)):
        scales = 32 * (64 // 64) * 2
        found = read_bytes(cost, PrecisionPlan(kind), 2)  # type: ignore[arg-type]
        assert found == 64 * 32 * bits / 8 + scales + 32 * 2
    odd = replace(cost, matrix_inputs=50)  # no block divides it: it stays in float
    assert read_bytes(odd, PrecisionPlan("int8_weights"), 2) == 2 * (64 * 32 + 32)
    table = replace(cost, op="embed", path="lm/embed")  # 8 bits are the only storage of tables
    found = read_bytes(table, PrecisionPlan("int4_weights"), 2)
    assert found == 64 * 32 + 32 * 2 + 32 * 2
