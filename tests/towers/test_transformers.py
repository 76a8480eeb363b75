"""Every architecture against the installed transformers on random tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgevlm.engines.lowering.lower import lower
from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.layouts.source import find_prefix
from edgevlm.toolkit.checkpoints.weights import check_tables
from edgevlm.toolkit.images.resize import bicubic
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.strict import Reader, read_json
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ComponentConfig
from tests.onnx_tools import model_of, run
from tests.systems.test_huggingface import scatter
from tests.towers.test_tower_goldens import near, opened, tensors

hf: Any = transformers
BASE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 7}
VIT = BASE | {"intermediate_size": 72}

# name -> (our kind, model class, configuration, image size, options of Config.read)
TOWERS: dict[str, tuple[str, Any, Any, tuple[int, int], dict[str, Any]]] = {
    "clip": ("clip", hf.CLIPVisionModel, hf.CLIPVisionConfig(**VIT, image_size=28), (28, 28), {}),
    "clip, gelu": (
        "clip",
        hf.CLIPVisionModel,
        hf.CLIPVisionConfig(**VIT, image_size=28, hidden_act="gelu"),
        (28, 28),
        {},
    ),
    "siglip": (
        "siglip",
        hf.SiglipVisionModel,
        hf.SiglipVisionConfig(**VIT, image_size=28),
        (28, 28),
        {},
    ),
    "mlcd": (
        "mlcd",
        hf.MLCDVisionModel,
        hf.MLCDVisionConfig(**VIT, image_size=28),
        (28, 28),
        {},
    ),
    "dinov2": ("dinov2", hf.Dinov2Model, hf.Dinov2Config(**BASE, image_size=28), (28, 28), {}),
    "dinov2, larger images": (
        "dinov2",
        hf.Dinov2Model,
        hf.Dinov2Config(**BASE, image_size=28),
        (42, 42),
        {"image_size": 42},
    ),
    "dinov2, smaller images": (
        "dinov2",
        hf.Dinov2Model,
        hf.Dinov2Config(**BASE, image_size=56),
        (35, 35),
        {"image_size": 35},
    ),
    "dinov2, swiglu": (
        "dinov2",
        hf.Dinov2Model,
        hf.Dinov2Config(**BASE, image_size=28, use_swiglu_ffn=True, qkv_bias=False),
        (28, 28),
        {},
    ),
    "dinov2, registers": (
        "dinov2",
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig(**BASE, image_size=56),
        (35, 35),
        {"image_size": 35},
    ),
    "convnext": (
        "convnext",
        hf.ConvNextModel,
        hf.ConvNextConfig(depths=[1, 2, 1], hidden_sizes=[8, 16, 24], num_stages=3),
        (48, 70),
        {},
    ),
}


def saved(name: str, folder: Path) -> Any:
    """The random model, saved as transformers saves it."""
    torch.manual_seed(5)
    model = TOWERS[name][1](TOWERS[name][2]).eval()
    scatter(model)
    model.save_pretrained(folder)
    return model


def loaded(name: str, folder: Path, taps: tuple[int, ...]) -> tuple[Any, dict[str, Array]]:
    """The same model read by us: its configuration and tensors, none unread."""
    kind, *_, options = TOWERS[name]
    file = models.encoder(kind)
    reader = Reader(read_json(folder / "config.json"), "config")
    config = file.Config.read(reader, taps, True, **options)
    reader.done()
    checkpoint = opened(folder / "model.safetensors")
    table = dict(file.names(config))
    prefix = find_prefix(table, checkpoint, "vision_model.", "")
    table = {k: r.below(prefix) for k, r in table.items()}
    unused = [prefix + glob for glob in file.unused(config)]
    check_tables([(table, file.shapes(config))], checkpoint, unused)
    return config, tensors(table, checkpoint)


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    kind, _, _, size, _ = TOWERS[name]
    convolutional = kind == "convnext"
    taps = (-1,) if convolutional else (0, 2, 3)
    config, weights = loaded(name, tmp_path, taps)
    pixels = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
    component = components.encoder_component(ComponentConfig(kind, kind, config))
    found = component.forward(NumpyOps(), Weights(weights), {"pixels": pixels})
    lowered = run(lower(model_of(component, weights), this_cpu()), {"pixels": pixels})
    with torch.no_grad():
        given = torch.from_numpy(pixels)
        if convolutional:
            last = model.encoder(model.embeddings(given)).last_hidden_state
            expected = [last.flatten(2).transpose(1, 2)]
        else:
            states = model(given, output_hidden_states=True).hidden_states
            expected = [states[tap] for tap in taps]
    for i, truth in enumerate(expected):
        array = truth.numpy()
        registers = getattr(config, "num_registers", 0)
        if registers:  # ours drop them
            array = np.delete(array, range(1, 1 + registers), axis=1)
        near(found[f"features.{i}"], array)
        near(lowered[f"features.{i}"], array)


@pytest.mark.parametrize("name", ["clip", "clip, gelu", "mlcd"])
def test_embeddings_are_the_pooled_outputs(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    kind, _, _, size, _ = TOWERS[name]
    file: Any = models.encoder(kind)
    config, _ = loaded(name, tmp_path, (-2,))
    table = dict(file.embed_names(config))
    assert set(table) == set(file.embed_shapes(config))
    checkpoint = opened(tmp_path / "model.safetensors")
    prefix = find_prefix(table, checkpoint, "vision_model.", "")
    table = {k: r.below(prefix) for k, r in table.items()}
    check_tables([(table, file.embed_shapes(config))], checkpoint, ["*.position_ids"])
    weights = tensors(table, checkpoint)
    pixels = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).pooler_output.numpy()
    part = components.Component(
        f"encoder.{kind}",
        lambda op, w, given: {"embedding": file.embed(op, config, w, given["pixels"])},
        file.embed_shapes(config),
        (components.Port("pixels", "float", ("tiles", 3, *size)),),
        (components.Port("embedding", "float", ("tiles", config.hidden_size)),),
    )
    found = part.forward(NumpyOps(), Weights(weights), {"pixels": pixels})["embedding"]
    lowered = run(lower(model_of(part, weights), this_cpu()), {"pixels": pixels})["embedding"]
    near(found, expected)
    near(lowered, expected)


@pytest.mark.parametrize(("have", "wanted"), [(37, 24), (5, 9), (16, 16), (7, 3)])
@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_is_torchs(have: int, wanted: int, antialias: bool) -> None:
    table = np.random.default_rng(2).normal(size=(have, have + 1, 3)).astype(np.float32)
    size = (wanted, wanted + 2)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table).permute(2, 0, 1)[None], size, mode="bicubic",
        align_corners=False, antialias=antialias,
    )[0].permute(1, 2, 0)  # fmt: skip
    found = bicubic(table, size, antialias=antialias)
    np.testing.assert_allclose(found, expected.numpy(), atol=3e-5)


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 64,
}
LMS: dict[str, tuple[str, Any, Any]] = {
    "llama": ("llama", hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT)),
    "qwen2": ("qwen2", hf.Qwen2ForCausalLM, hf.Qwen2Config(**TEXT)),
    "qwen2, tied": ("qwen2", hf.Qwen2ForCausalLM, hf.Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "qwen2, biased heads of 24 channels": (
        "qwen2",
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**TEXT | {"hidden_size": 96}),
    ),
    "mistral": ("mistral", hf.MistralForCausalLM, hf.MistralConfig(**TEXT, sliding_window=None)),
    "mistral, window": (
        "mistral",
        hf.MistralForCausalLM,
        hf.MistralConfig(**TEXT, sliding_window=5),
    ),
}


@pytest.mark.parametrize("name", LMS)
def test_language_models(name: str, tmp_path: Path) -> None:
    kind, model_class, settings = LMS[name]
    torch.manual_seed(6)
    model = model_class(settings).eval()
    scatter(model)
    model.save_pretrained(tmp_path)
    file = models.lm(kind)
    reader = Reader(read_json(tmp_path / "config.json"), "config")
    config = file.Config.read(reader)
    reader.done()
    checkpoint = opened(tmp_path / "model.safetensors")
    table = dict(file.names(config))
    check_tables([(table, file.shapes(config))], checkpoint, file.unused(config))
    component, weights = (
        components.lm_component(ComponentConfig("lm", kind, config)),
        tensors(table, checkpoint),
    )
    ids = np.random.default_rng(3).integers(0, 200, (1, 12))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
        greedy = model.generate(torch.from_numpy(ids), max_new_tokens=8, do_sample=False)
    lowered = lower(model_of(component, weights), this_cpu())
    logits, states = call(component, lowered, weights, ids, 0, {})
    near(logits, expected)
    found = []
    for step in range(8):
        found.append(int(logits[0, -1].argmax()))
        last = np.asarray([[found[-1]]])
        logits, states = call(component, lowered, weights, last, 12 + step, states)
    assert found == greedy[0, 12:].tolist()[: len(found)]


def call(
    component: components.Component,
    lowered: Any,
    weights: dict[str, Array],
    ids: Array,
    start: int,
    states: dict[str, Array],
) -> tuple[Array, dict[str, Array]]:
    """One call of the lowered graph, compared with the reference's; logits and states."""
    width = next(p.shape[1] for p in component.inputs if p.name == "features")
    feed: dict[str, Array] = {
        "ids": ids,
        "rows": np.full_like(ids, -1),
        "features": np.zeros((1, int(width)), np.float32),
        "start": np.asarray([start]),
        "score": np.arange(ids.shape[1])[None],
    }
    for port in component.inputs:
        if port.name.startswith("past."):
            shape = [{"batch": 1, "context": 32}.get(str(n), n) for n in port.shape]
            feed[port.name] = states.get(port.name, np.zeros(shape, np.float32))  # type: ignore[arg-type]
    outputs = component.forward(NumpyOps(), Weights(weights), feed)
    near(run(lowered, feed)["logits"], outputs["logits"], 2e-5)
    kept = {k.replace("present", "past"): v for k, v in outputs.items() if k != "logits"}
    return outputs["logits"], kept
