"""Towers and mergers alone against the original code's outputs: oracle and lowered ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.lower import lower
from tests.onnx_tools import model_of, run
from toolkit import models
from toolkit.config import Part
from toolkit.images import load, preprocess, read_preprocess
from toolkit.models import vlm
from toolkit.models.encoders import convnext, mlcd, unireplknet
from toolkit.ops import Array, Weights
from toolkit.reference import NumpyOps
from toolkit.safetensors_io import SafetensorsFile
from toolkit.strict import Reader, read_json
from toolkit.target import this_cpu
from toolkit.weights import Checkpoint, Recipe, Recipes, check_tables


def opened(path: Path) -> Checkpoint:
    file = SafetensorsFile(path)
    return Checkpoint(dict.fromkeys(file.keys(), file), str(path))


def tensors(table: dict[str, Recipe], checkpoint: Checkpoint) -> dict[str, Array]:
    return {k: np.asarray(v, np.float32) for k, v in Recipes(table, checkpoint).items()}


def near(found: Array, expected: Array, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    scale = max(float(np.abs(expected).max()), 1.0)
    np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0)


def both_ways(kind: str, config: Any, weights: dict[str, Array], pixels: Array) -> list[Array]:
    """The encoder's outputs by the oracle, checked against the lowered graph's."""
    part = vlm.encoder_component(Part("eye", kind, config))
    expected = part.forward(NumpyOps(), Weights(weights), {"pixels": pixels})
    found = run(lower(model_of(part, weights), this_cpu()), {"pixels": pixels})
    for name, array in expected.items():
        near(found[name], array, 2e-5)
    return list(expected.values())


@pytest.mark.parametrize("golden", ["convnext5"], indirect=True)
def test_convnext_with_five_stages(golden: Path) -> None:
    folder = golden / "vision_tower"
    reader = Reader(read_json(folder / "config.json"), "config")
    config = convnext.Config.read(reader, (-1,), False)
    reader.done()
    checkpoint = opened(folder / "model.safetensors")
    table = dict(convnext.names(config))
    check_tables([(table, convnext.shapes(config))], checkpoint, convnext.unused(config))
    weights = tensors(table, checkpoint)
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    for i in range(4):
        pixels = inputs[f"pixel_values_{i}"].astype(np.float32)
        (found,) = both_ways("convnext", config, weights, pixels)
        near(found, outputs[f"features_{i}"])


@pytest.mark.parametrize("file", ["weights.safetensors", "weights_deploy.safetensors"])
@pytest.mark.parametrize("golden", ["unireplknet5"], indirect=True)
def test_unireplknet_open_and_merged(golden: Path, file: str) -> None:
    checkpoint = opened(golden / file)
    config = unireplknet.Config.of(checkpoint)
    assert config.merged == ("deploy" in file)
    table = dict(unireplknet.names(config))
    check_tables([(table, unireplknet.shapes(config))], checkpoint, unireplknet.unused(config))
    weights = tensors(table, checkpoint)
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    for i in range(4):
        (found,) = both_ways("unireplknet", config, weights, inputs[f"pixel_values_{i}"])
        near(found, outputs[f"features_{i}"])
        near(found, outputs[f"features_deploy_{i}"])


@pytest.mark.parametrize("golden", ["siglip_tower"], indirect=True)
def test_siglip(golden: Path) -> None:
    file = models.encoder("siglip")
    checkpoint = opened(golden / "weights.safetensors")
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    reader = Reader(read_json(golden / "config.json"), "config")
    config = file.Config.read(reader, (-2, -1), False)
    reader.done()
    table = {k: r.below("vision_model.") for k, r in file.names(config).items()}
    unused = [f"vision_model.{glob}" for glob in file.unused(config)]
    check_tables([(table, file.shapes(config))], checkpoint, unused)
    weights = tensors(table, checkpoint)
    for name in ("png", "png_padded", "batch"):
        pixels = inputs[f"pixel_values_{name}"]
        before, last = both_ways("siglip", config, weights, pixels)
        near(before, outputs[f"features_minus2_{name}"])
        near(last, outputs[f"features_minus1_{name}"])
    rule = read_preprocess(Reader(read_json(golden / "preprocessor_config.json"), "processor"))
    picture = load(golden / "picture.png").rgb
    assert np.array_equal(preprocess(picture, rule)[None], inputs["pixel_values_png"])
    padded = preprocess(picture, rule.padded())
    assert np.array_equal(padded[None], inputs["pixel_values_png_padded"])


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("golden", ["mlcd_vit_rope2d"], indirect=True)
def test_mlcd_rotates_by_row_and_column(golden: Path, native: bool) -> None:
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    data = read_json(golden / "hf" / "config.json")
    reader = Reader(data, "config")
    base = mlcd.Config.read(reader, tuple(range(data["num_hidden_layers"] + 1)), True)
    reader.done()
    file = golden / ("native.safetensors" if native else "hf/model.safetensors")
    checkpoint = opened(file)
    for name in inputs.files:
        pixels = inputs[name]
        config = type(base)(**{**vars(base), "size": pixels.shape[2:]})
        if native:
            table = dict(mlcd.native_names(config))
        else:
            table = {k: r.below("vision_model.") for k, r in mlcd.names(config).items()}
        weights = tensors(table, checkpoint)
        found = both_ways("mlcd", config, weights, pixels)
        key = f"{name}.hidden_states_true_hw"
        expected = outputs[key if key in outputs.files else f"{name}.hidden_states"]
        near(np.stack(found), expected)
        angles = np.concatenate([weights["class_angle"][None], mlcd.patch_angles(config)])
        if f"{name}.rotary_angles" in outputs.files and pixels.shape[2] == pixels.shape[3]:
            near(angles, outputs[f"{name}.rotary_angles"].reshape(angles.shape))


@pytest.mark.parametrize("golden", ["mlcd_vit_plain_clip"], indirect=True)
def test_plain_clip_towers_of_mlcd(golden: Path) -> None:
    file = models.encoder("clip")
    (folder,) = [f for f in golden.iterdir() if f.is_dir()]
    data = read_json(folder / "config.json")
    taps = tuple(range(data["num_hidden_layers"] + 1))
    reader = Reader(data, "config")
    config = file.Config.read(reader, taps, True)
    reader.done()
    checkpoint = opened(folder / "model.safetensors")
    table = {k: r.below("vision_model.") for k, r in file.names(config).items()}
    weights = tensors(table, checkpoint)
    pixels = np.load(golden / "inputs.npz")["pixel_values"]
    outputs = np.load(golden / "outputs.npz")
    found = both_ways("clip", config, weights, pixels)
    near(np.stack(found), outputs["hidden_states"])


@pytest.mark.parametrize("golden", ["ms_deform_attn"], indirect=True)
def test_deformable_attention(golden: Path) -> None:
    case = json.loads((golden / "case.json").read_text())
    w = opened(golden / "model.safetensors")
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    grids = tuple((int(h), int(wide)) for h, wide in inputs["spatial_shapes"])

    def linear(name: str, x: Array) -> Array:
        return np.asarray(x @ w.read(f"{name}.weight").T + w.read(f"{name}.bias"))

    query = inputs["query"]
    offsets, scores = (linear(n, query) for n in ("sampling_offsets", "attention_weights"))
    value = linear("value_proj", inputs["value_input"])
    masked = value * ~inputs["padding_mask"][..., None]
    width = case["d_model"] // case["n_heads"]
    for name, values, reference in (
        ("out_ref2", value, inputs["reference_points_2"]),
        ("out_ref4", value, inputs["reference_points_4"]),
        ("out_ref2_masked", masked, inputs["reference_points_2"]),
    ):
        for batch in range(query.shape[0]):  # our reference points belong to the model, not a call
            one = slice(batch, batch + 1)
            core = NumpyOps().ms_deform_attn(
                values[one], offsets[one], scores[one], grids=grids, heads=case["n_heads"],
                points=case["n_points"], head_width=width, reference=reference[batch],
            )  # fmt: skip
            near(linear("output_proj", core), outputs[name][one])
