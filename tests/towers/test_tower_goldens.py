"""Towers and mergers alone against the original code's outputs: reference and lowered ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.lowering.lower import lower
from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.checkpoints.weights import Checkpoint, Recipes, check_tables
from edgevlm.toolkit.images.decode import load
from edgevlm.toolkit.images.preprocess import preprocess, read_preprocess
from edgevlm.toolkit.models.encoders import convnext, mlcd, unireplknet
from edgevlm.toolkit.models.mergers import comm, mmfuser
from edgevlm.toolkit.models.recipes import Recipe
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.strict import Reader, read_json
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ComponentConfig
from tests.onnx_tools import model_of, run


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
    """The encoder's outputs by the reference, checked against the lowered graph's."""
    component = components.encoder_component(ComponentConfig(kind, kind, config))
    expected = component.forward(NumpyOps(), Weights(weights), {"pixels": pixels})
    found = run(lower(model_of(component, weights), this_cpu()), {"pixels": pixels})
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
    shapes = {key: checkpoint.shape(key) for key in checkpoint.keys()}  # noqa: SIM118
    config = unireplknet.Config.of(shapes, checkpoint.where)
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
    image = load(golden / "picture.png").rgb
    assert np.array_equal(preprocess(image, rule)[None], inputs["pixel_values_png"])
    padded = preprocess(image, rule.padded())
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
        config = type(base)(**{**vars(base), "image_size": pixels.shape[2:]})
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


Grids = tuple[tuple[int, int], ...]  # (height, width) of each level


@pytest.mark.parametrize("golden", ["ms_deform_attn"], indirect=True)
def test_deformable_attention(golden: Path) -> None:
    case = json.loads((golden / "case.json").read_text())
    w = opened(golden / "model.safetensors")
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    grids = tuple((int(h), int(w)) for h, w in inputs["spatial_shapes"])

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
        common = (max(h for h, _ in grids), max(w for _, w in grids))
        core = NumpyOps().ms_deform_attn(
            on_one_grid(values, grids, common),
            offsets_on_one_grid(offsets, reference, grids, common, case["n_points"]),
            scores, grid=common, num_levels=len(grids), num_heads=case["n_heads"],
            num_points=case["n_points"], head_dim=width,
            reference=np.zeros((query.shape[1], 2), np.float32),
        )  # fmt: skip
        near(linear("output_proj", core), outputs[name])


def on_one_grid(value: Array, grids: Grids, common: tuple[int, int]) -> Array:
    """Levels of several sizes as levels of one, zeros (what lies outside) at right and bottom."""
    batch, _, channels = value.shape
    found, start = np.zeros((batch, len(grids), *common, channels), value.dtype), 0
    for level, (height, width) in enumerate(grids):
        cells = value[:, start : start + height * width]
        found[:, level, :height, :width] = cells.reshape(batch, height, width, channels)
        start += height * width
    return found.reshape(batch, -1, channels)


def offsets_on_one_grid(
    offsets: Array, reference: Array, grids: Grids, common: tuple[int, int], points: int
) -> Array:
    """The original's points, whose references differ by level and may be boxes, as offsets alone.

    reference [B, Q, levels, 2 or 4]; the result counts cells from reference (0, 0).
    """
    batch, queries = offsets.shape[:2]
    shifts = offsets.reshape(batch, queries, -1, len(grids), points, 2)
    sizes = np.asarray([(w, h) for h, w in grids], np.float32)[:, None]
    moved = reference[:, :, None, :, None, :2] * sizes
    if reference.shape[-1] == 4:
        shifts = shifts / points * reference[:, :, None, :, None, 2:] * 0.5 * sizes
    return np.asarray(shifts + moved, np.float32).reshape(batch, queries, -1)


@pytest.mark.parametrize("golden", ["mmfuser_block"], indirect=True)
def test_mmfuser_block(golden: Path) -> None:
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    levels = inputs["srcs"]
    width, side = levels.shape[-1], int(levels.shape[2] ** 0.5)
    config = mmfuser.Config(hidden_size=width, side=side, outputs=width, layers=1)
    table = {f"fuser.{k}": r for k, r in mmfuser.fuser_names().items()}
    weights = tensors(table, opened(golden / "model.safetensors"))
    # A projector that changes nothing shows the fuser's own output.
    weights |= {
        "projector.linears.0.weight": np.eye(width, dtype=np.float32),
        "projector.linears.0.bias": np.zeros(width, np.float32),
    }
    found = mmfuser.forward(NumpyOps(), config, Weights(weights), list(levels))
    near(found, outputs["fused"])


def comm_output(golden: Path, branches: tuple[comm.Branch, ...], renames: dict[str, str]) -> Array:
    """COMM's merged output with the golden's weights, whose names are brought to our format's."""
    checkpoint = opened(golden / "weights.safetensors")
    inputs = np.load(golden / "inputs.npz")
    config = comm.Config(branches, outputs=24, side=4)
    table = {
        key: Recipe(tuple(renames.get(s, s) for s in r.sources), r.make)
        for key, r in comm.names(config).items()
    }
    features = [inputs[f"{b.name}_layers"][level] for b in branches for level in b.levels]
    wanted = [k for k in table if not k.startswith("project.")]
    weights = {k: np.asarray(Recipes(table, checkpoint)[k], np.float64) for k in wanted}
    total = sum(b.hidden_size for b in branches)
    weights |= {"project.weight": np.eye(total), "project.bias": np.zeros(total)}
    if len(branches) == 2:
        weights |= {k: Recipes(table, checkpoint)[k] for k in ("project.weight", "project.bias")}
    return comm.forward(NumpyOps(), config, Weights(weights), features)


NAMES = {
    "clip.scale": "alpha",
    "dino.scale": "beta",
    **{f"dino.mlp.0.{fc}.{leaf}": f"mlp.{fc}.{leaf}" for fc in ("fc1", "fc2")
       for leaf in ("weight", "bias")},
}  # fmt: skip


@pytest.mark.parametrize("golden", ["comm_mfm"], indirect=True)
def test_comm_equation_one(golden: Path) -> None:
    outputs = np.load(golden / "outputs.npz")
    for merge, scale, key in (
        ("norm_linear", "raw", "equation"),
        ("norm_linear", "softmax", "softmax_scales"),
        ("linear_norm", "raw", "linear_then_norm"),
    ):
        branches = tuple(
            comm.Branch(name, levels, 16, merge, scale, mlp_depth=depth)  # type: ignore[arg-type]
            for name, levels, depth in (("clip", tuple(range(6)), 0), ("dino", (3, 4, 5), 1))
        )
        found = comm_output(golden, branches, NAMES)
        near(found, outputs[f"{key}.projected"], 1e-6)


COMM_VARIANTS = {
    "mean_all": ("mean", "raw", range(6)),
    "mean_half_inclusive_over_half": ("mean_half", "raw", range(2, 6)),
    "mean_last_half": ("mean", "raw", range(3, 6)),
    "layerscale_softmax": ("layerscale", "softmax", range(6)),
    "layerscale_raw": ("layerscale", "raw", range(6)),
    "conv1_layerscale_softmax": ("conv1", "softmax", range(6)),
    "conv3_layerscale_softmax": ("conv3", "softmax", range(6)),
}


@pytest.mark.parametrize("variant", COMM_VARIANTS)
@pytest.mark.parametrize("golden", ["comm_mfm"], indirect=True)
def test_comm_variants_of_merging(golden: Path, variant: str) -> None:
    merge, scale, levels = COMM_VARIANTS[variant]
    branch = comm.Branch("clip", tuple(levels), 16, merge, scale)  # type: ignore[arg-type]
    names = dict(NAMES)
    for level in levels:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            names[f"clip.{level}.conv.{leaf}"] = f"{merge}.{level}.{leaf}"
            names[f"clip.{level}.bn.{leaf}"] = f"bn.{level}.{leaf}"
    outputs = np.load(golden / "outputs.npz")
    near(comm_output(golden, (branch,), names), outputs[variant], 1e-6)
