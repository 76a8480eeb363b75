"""Tier 2: every architecture's `tiny()` agrees across interpreters; cached = uncached decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgevlm.engines.lowering.lower import lower
from edgevlm.export.write import check_shapes
from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.weights import RandomWeights
from edgevlm.toolkit.images.longest_side import LongestSide
from edgevlm.toolkit.models.encoders import mlcd
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import mmfuser
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec, Specs
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig, Segmenter
from edgevlm.training.torch_ops import TorchOps
from tests.onnx_tools import model_of, run

ROLES = ("encoders", "mergers", "lms", "segmenters")
FILES = [(role, kind) for role in ROLES for kind in models.kinds(role)]  # type: ignore[arg-type]
LMS = models.kinds("lms")


def component(role: str, kind: str) -> Component:
    """The architecture's tiny instance as a component of a model."""
    if role == "encoders":
        config = models.encoder(kind).tiny()
        return components.encoder_component(ComponentConfig("eye", kind, config))
    if role == "lms":
        return components.lm_component(ComponentConfig("lm", kind, models.lm(kind).tiny()))
    if role == "segmenters":
        return components.mask_component(_segmenter(kind))
    config = models.merger(kind).tiny()
    return components.merger_component(ComponentConfig("merger", kind, config), _feeding(config))


def _segmenter(kind: str) -> Segmenter:
    encoder = ComponentConfig("sam", "sam", models.encoder("sam").tiny())
    decoder = ComponentConfig(kind, kind, models.segmenter(kind).tiny())
    return Segmenter("[SEG]", encoder, decoder, LongestSide(28))


def _feeding(config: Any) -> tuple[ComponentConfig, ...]:
    """Stand-in encoders whose outputs are what a merger takes."""
    clip = models.encoder("clip")
    base = clip.tiny()
    return tuple(
        ComponentConfig(f"eye{i}", "clip", type(base)(**{**vars(base), "hidden_size": size}))
        for i, size in enumerate(config.sources)
    )


def tensors(part: Component) -> dict[str, Array]:
    """Random parameters, norms and biases included."""
    generator = np.random.default_rng(1)
    drawn = dict(RandomWeights(part.shapes, 0, part.name))
    noise = {k: np.asarray(generator.normal(0, 0.1, v.shape), np.float32) for k, v in drawn.items()}
    return {k: v + noise[k] for k, v in drawn.items()}


AXES = {
    "height": 40,
    "width": 56,
    "tokens": 4,
    "tiles": 2,
    "rows": 5,
    "batch": 1,
    "sequence": 6,
    "scored": 2,
    "context": 12,
    "masks": 2,
}


def feed(part: Component) -> dict[str, Array]:
    """Inputs for one call; a language model gets a prompt with image rows and an empty cache."""
    generator = np.random.default_rng(2)
    found: dict[str, Array] = {}
    for port in part.inputs:
        shape = [AXES[n] if isinstance(n, str) else n for n in port.shape]
        if port.name.startswith("past."):
            found[port.name] = np.zeros(shape, np.float32)
        elif port.dtype == "float":
            found[port.name] = generator.normal(0, 1, shape).astype(np.float32)
    if "ids" in [port.name for port in part.inputs]:
        found |= {
            "ids": generator.integers(0, 90, (1, 6)),
            "rows": np.asarray([[-1, 4, 0, 2, -1, -1]]),
            "start": np.zeros(1, np.int64),
            "score": np.asarray([[2, 5]]),
        }
    return found


def compare(found: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    for name, array in expected.items():
        scale = float(np.abs(array).max())
        np.testing.assert_allclose(found[name], array, atol=tolerance * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize(("role", "kind"), FILES)
def test_torch_equals_the_reference(role: str, kind: str) -> None:
    part = component(role, kind)
    weights, inputs = tensors(part), feed(part)
    expected = part.forward(NumpyOps(), Weights(weights), inputs)
    parameters = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in weights.items()}
    given = {k: torch.from_numpy(v) for k, v in inputs.items()}
    found = part.forward(TorchOps(), Weights(parameters), given)
    compare({k: v.detach().numpy() for k, v in found.items()}, expected, 2e-5)
    loss = torch.stack([v.square().mean() for v in found.values() if v.requires_grad]).sum()
    torch.autograd.backward(loss)
    assert [name for name, p in parameters.items() if p.grad is None] == []


@pytest.mark.parametrize(("role", "kind"), FILES)
def test_onnx_equals_the_reference_kept_and_lowered(role: str, kind: str) -> None:
    part = component(role, kind)
    weights, inputs = tensors(part), feed(part)
    expected = part.forward(NumpyOps(), Weights(weights), inputs)
    model = model_of(part, weights)
    compare(run(model, inputs), expected, 2e-5)
    plain = {p.name for p in part.outputs if not p.updates}
    found = run(lower(model, this_cpu()), inputs)
    compare(found, {k: v for k, v in expected.items() if k in plain}, 2e-5)


@pytest.mark.parametrize(("role", "kind"), FILES)
def test_shapes_and_ports_tell_the_truth(role: str, kind: str) -> None:
    part = component(role, kind)
    inputs = feed(part)
    expected = part.forward(NumpyOps(), Weights(tensors(part)), inputs)
    given = {k: Spec(v.shape) for k, v in inputs.items()}
    found = part.forward(ShapeOps(), Weights(Specs(part.shapes)), given)
    assert {k: s.shape for k, s in found.items()} == {k: v.shape for k, v in expected.items()}
    axes = {
        name: length
        for port in part.inputs
        for name, length in zip(port.shape, inputs[port.name].shape, strict=True)
    }
    for port in part.outputs:
        shape = expected[port.name].shape
        assert len(port.shape) == len(shape)
        for name, length in zip(port.shape, shape, strict=True):
            known = name if isinstance(name, int) else axes.get(name)
            assert name in MADE_INSIDE or known == length, (port.name, name)


MADE_INSIDE = ("tokens", "rows")  # axes of outputs whose length follows from the architecture


@pytest.mark.parametrize("kind", LMS)
def test_rows_of_a_batch_are_those_of_single_calls(kind: str) -> None:
    part = component("lms", kind)
    weights: Weights[Array] = Weights(tensors(part))
    generator, one = np.random.default_rng(7), feed(part)
    ids = generator.integers(0, 90, (3, 2))
    past = {k: generator.normal(0, 1, (3, *v.shape[1:])) for k, v in one.items() if "past" in k}
    calls = {
        "ids": ids,
        "rows": np.asarray([[-1, -1], [3, -1], [0, 1]]),
        "start": np.asarray([0, 4, 9]),
        "score": np.asarray([[1], [0], [1]]),
        **{k: v.astype(np.float32) for k, v in past.items()},
    }
    together = part.forward(NumpyOps(), weights, one | calls)
    for row in range(3):
        alone = part.forward(
            NumpyOps(), weights, one | {k: v[row : row + 1] for k, v in calls.items()}
        )
        for name, array in alone.items():
            np.testing.assert_allclose(together[name][row], array[0], atol=1e-5, err_msg=name)


LAYERS = {
    "clip": ["layers.0", "layers.1"],
    "siglip": ["layers.0", "layers.1", "layers.2"],
    "dinov2": ["layers.0", "layers.1", "layers.2"],
    "mlcd": ["layers.0", "layers.1"],
    "unicom": ["layers.0", "layers.1"],
    "sam": ["layers.0", "layers.1"],
    "sam_decoder": ["layers.0", "layers.1"],
    "convnext": ["stages.0/blocks.0", "stages.1/blocks.0", "stages.2/blocks.0",
                 "stages.2/blocks.1"],
    "unireplknet": ["stages.0/blocks.0", "stages.1/blocks.0", "stages.2/blocks.0",
                    "stages.2/blocks.1"],
    "llama": ["layers.0", "layers.1"],
    "mistral": ["layers.0", "layers.1"],
    "qwen2": ["layers.0", "layers.1"],
}  # fmt: skip


@pytest.mark.parametrize(("role", "kind"), [f for f in FILES if f[0] != "mergers"])
def test_each_layer_is_a_block_that_owns_its_parameters(role: str, kind: str) -> None:
    """Seen from inside a wrapper: which block runs, and whose parameters each op reads."""
    part = component(role, kind)
    blocks: list[str] = []
    read: list[tuple[str, str]] = []

    class Watch(Wrapper[Array]):
        inside = ""

        def block(self, function: Any, w: Weights[Array], *args: Any) -> Any:
            blocks.append(w.path)
            self.inside = w.path
            result = super().block(function, w, *args)
            self.inside = ""
            return result

        def linear(self, x: Array, w: Weights[Array]) -> Array:
            read.append((self.inside, w.path))
            return self.inner.linear(x, w)

        def layer_norm(self, x: Array, w: Weights[Array], eps: float) -> Array:
            read.append((self.inside, w.path))
            return self.inner.layer_norm(x, w, eps)

        def rms_norm(self, x: Array, w: Weights[Array], eps: float) -> Array:
            read.append((self.inside, w.path))
            return self.inner.rms_norm(x, w, eps)

    watch: Any = Watch(NumpyOps(), part.name)
    part.forward(watch, Weights(tensors(part)), feed(part))
    assert blocks == LAYERS[kind]
    assert {inside for inside, _ in read if inside} == set(LAYERS[kind])
    for inside, path in read:
        owner = next((layer for layer in LAYERS[kind] if f"{path}/".startswith(f"{layer}/")), "")
        assert inside == owner, path


@pytest.mark.parametrize(("role", "kind"), FILES)
def test_functions_say_what_they_are_in_numbers(role: str, kind: str) -> None:
    """No Reshape targets: a call's attributes are numbers, and are those its function names."""
    part = component(role, kind)
    model = model_of(part, tensors(part))
    declared = {f.name: set(f.attribute) for f in model.functions}
    for node in model.graph.node:
        if node.domain == "edgevlm":
            assert {a.name for a in node.attribute} == declared[node.op_type]
            kinds = {a.type for a in node.attribute}
            assert kinds <= {onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT}


@pytest.mark.parametrize(("role", "kind"), FILES)
def test_shapes_are_known_through_the_function_bodies(role: str, kind: str) -> None:
    """Also those that a body computes from its attributes: the channels are always a number."""
    part = component(role, kind)
    inferred = check_shapes(model_of(part, tensors(part)))
    known = {v.name: v.type.tensor_type.shape for v in inferred.graph.value_info}
    for node in inferred.graph.node:
        if node.domain == "edgevlm":
            assert all(known[n].dim[-1].dim_value for n in node.output if n in known), node.name


def test_tables_are_made_once_and_cannot_be_changed() -> None:
    tables: list[Callable[[], Array]] = [
        lambda: llama.rotary_tables(llama.tiny())[0],
        lambda: mlcd.patch_angles(mlcd.tiny()),
        lambda: mmfuser.cell_centres(4),
    ]
    for table in tables:
        assert table() is table()
        with pytest.raises(ValueError, match="read-only"):
            table()[0, 0] = 1.0


@pytest.mark.parametrize(("role", "kind"), FILES)
def test_names_cover_every_tensor_once(role: str, kind: str) -> None:
    finders = {"encoders": models.encoder, "mergers": models.merger, "lms": models.lm}
    file: Any = {**finders, "segmenters": models.segmenter}[role](kind)
    config = file.tiny()
    table = file.names(config)
    assert set(table) == set(file.shapes(config))


@pytest.mark.parametrize("kind", LMS)
def test_cached_decoding_equals_one_pass(kind: str) -> None:
    part = component("lms", kind)
    weights: Weights[Array] = Weights(tensors(part))
    inputs = feed(part) | {"score": np.asarray([[0, 1, 2, 3, 4, 5]])}
    whole = part.forward(NumpyOps(), weights, inputs)["logits"]
    states = {k: v for k, v in inputs.items() if k.startswith("past.")}
    logits = []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        call = inputs | states
        call |= {k: inputs[k][:, start:stop] for k in ("ids", "rows")}
        call |= {"start": np.asarray([start]), "score": np.arange(stop - start)[None]}
        outputs = part.forward(NumpyOps(), weights, call)
        logits.append(outputs["logits"])
        states = {k.replace("present", "past"): v for k, v in outputs.items() if k != "logits"}
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, atol=1e-5)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("kind", LMS)
def test_a_prompt_in_pieces_equals_one_pass(kind: str, lowered: bool) -> None:
    """Pieces before the last ask for no logits: their scored axis is empty."""
    part = component("lms", kind)
    weights, inputs = tensors(part), feed(part) | {"score": np.asarray([[5]])}
    whole = part.forward(NumpyOps(), Weights(weights), inputs)["logits"]
    model = model_of(part, weights)
    model = lower(model, this_cpu()) if lowered else model
    states = {k: v for k, v in inputs.items() if k.startswith("past.")}
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        call = inputs | states
        call |= {k: inputs[k][:, start:stop] for k in ("ids", "rows")}
        scored = np.full((1, int(stop == 6)), stop - start - 1)
        outputs = run(model, call | {"start": np.asarray([start]), "score": scored})
        states = {k.replace("present", "past"): v for k, v in outputs.items() if k != "logits"}
    np.testing.assert_allclose(outputs["logits"], whole, atol=1e-5)


def test_a_model_connects_what_its_components_offer() -> None:
    from edgevlm.toolkit import systems

    for name, system in systems.presets().items():
        model = systems.find(system).PRESETS[name]()
        parts = {p.name: p for p in components.components(model)}
        for edge in components.edges(model):
            name, port = edge.target.split(":")
            assert port in [p.name for p in parts[name].inputs]
            if ":" in edge.source:
                name, port = edge.source.split(":")
                assert port in [p.name for p in parts[name].outputs]


def test_configurations_round_trip_through_json() -> None:
    import json

    from edgevlm.toolkit import systems
    from edgevlm.toolkit.vlm.config import from_json, to_json

    for name, system in systems.presets().items():
        model: ModelConfig = systems.find(system).PRESETS[name]()
        assert from_json(json.loads(json.dumps(to_json(model))), "test") == model
