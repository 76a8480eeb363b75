"""ConvLLaVA with other ConvNeXt and UniRepLKNet towers, against transformers and plain torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from tests.systems import joined
from tests.systems.test_huggingface import clip_processor, scatter

hf: Any = joined.hf


@dataclass(frozen=True)
class Variant:
    """One checkpoint. tower: mm_vision_tower; path: of its folder, from the checkpoint."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    size: int
    config: dict[str, Any] = field(default_factory=dict)
    lm: dict[str, Any] = field(default_factory=dict)
    tower: str = "./tower"
    path: str = "../tower"
    shards: int = 1
    torch_files: bool = False
    scaled: bool = True
    image: tuple[int, int] = (90, 61)


VARIANTS = {
    "five stages": Variant((1, 2, 1, 1, 2), (6, 10, 14, 18, 22), 128),
    "four stages": Variant((2, 1, 3, 1), (8, 12, 20, 28), 96, {"mm_projector_type": "mlp3x_gelu"}),
    "five stages, layer -2": Variant(
        (1, 1, 2, 1, 2), (6, 10, 14, 18, 22), 128, {"mm_vision_select_layer": -2}
    ),
    "four stages, layer -2 as text, last stage of one block": Variant(
        (1, 1, 2, 1), (6, 10, 14, 18), 70, {"mm_vision_select_layer": "-2"}
    ),
    "size no multiple of the stride, landscape": Variant(
        (1, 1, 1, 1, 1), (6, 10, 14, 18, 22), 203, image=(203, 40), shards=2
    ),
    "no padding, portrait, class tokens selected": Variant(
        (1, 1, 1, 1, 1), (6, 10, 14, 18, 22), 150,
        {"image_aspect_ratio": None, "mm_vision_select_feature": "cls_patch"}, image=(40, 120),
    ),
    "torch files, id of the hub, inside, one linear with a number": Variant(
        (1, 1, 1, 1, 1), (6, 10, 14, 18, 22), 128, {"mm_projector_type": "mlp1x_gelu"},
        tower="ConvLLaVA/ConvLLaVA-ConvNeXt-768", path="ConvLLaVA-ConvNeXt-768",
        torch_files=True, shards=3,
    ),
    "linear, one kv head, heads of 20": Variant(
        (1, 1, 1, 1), (6, 10, 14, 18), 64, {"mm_projector_type": "linear"},
        {"num_key_value_heads": 1, "hidden_size": 40, "num_attention_heads": 2},
    ),
    "no layer scale, identity": Variant(
        (1, 1, 1, 1), (6, 10, 14, 48), 64, {"mm_projector_type": "identity"}, scaled=False
    ),
    "tiles, flat": Variant(
        (1, 1, 1, 1), (6, 10, 14, 18), 64,
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[128, 64], [64, 128]]},
    ),
}  # fmt: skip


def make_tower(v: Variant) -> Any:
    torch.manual_seed(2)
    config = hf.ConvNextConfig(
        depths=list(v.depths), hidden_sizes=list(v.dims), num_stages=len(v.dims),
        image_size=v.size, layer_scale_init_value=1e-6 if v.scaled else 0.0,
        out_features=[f"stage{len(v.dims)}"],
    )  # fmt: skip
    tower = hf.ConvNextModel(config).eval()
    scatter(tower)
    return tower


def write_tower(folder: Path, tower: Any, v: Variant) -> None:
    """As the trainer writes it: config, processor, and weights without the final norm."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tower.config.to_dict()))
    clip_processor(v.size).save_pretrained(folder)
    own = {k: t for k, t in tower.state_dict().items() if not k.startswith("layernorm")}
    joined.shard(folder, own, 1, v.torch_files)


def projector_of(v: Variant, width: int) -> torch.nn.Module:
    name = v.config.get("mm_projector_type", "mlp2x_gelu")
    if name == "identity":
        return torch.nn.Identity()
    if name == "linear":
        return joined.linears(v.dims[-1], width)[0]
    return joined.linears(v.dims[-1], *(width,) * int(name[3]))


def features(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[1, tokens, width] of the last stage, without its norm."""
    with torch.no_grad():
        found: torch.Tensor = tower.encoder(tower.embeddings(pixels)).last_hidden_state
    return found.flatten(2).transpose(1, 2)


def views(v: Variant, path: Path) -> list[torch.Tensor]:
    """Pixels as the checkpoint's configuration makes them."""
    from PIL import Image

    shown, aspect = joined.shown(path), v.config.get("image_aspect_ratio", "pad")
    if aspect == "anyres":  # 90 x 61 fits 128 x 64 best: 95 x 64, onto black
        canvas = Image.new("RGB", (128, 64))
        canvas.paste(shown.resize((95, 64)), ((128 - 95) // 2, 0))
        tiles = [canvas.crop((x, 0, x + 64, 64)) for x in (0, 64)]
        return [joined.pixels(v.size, view) for view in (shown.resize((64, 64)), *tiles)]
    return [joined.pixels(v.size, joined.padded(path) if aspect == "pad" else shown)]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids(name: str, tmp_path: Path) -> None:
    v = VARIANTS[name]
    lm, tower = joined.language_model(**v.lm), make_tower(v)
    projector = projector_of(v, lm.config.hidden_size)
    folder = tmp_path / "convllava"
    settings = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1,
                "image_aspect_ratio": "pad"} | v.config  # fmt: skip
    settings |= {"mm_vision_tower": v.tower, "mm_hidden_size": v.dims[-1]}
    tensors = joined.below("model.mm_projector.", projector)
    joined.write(folder, lm, tensors, settings, shards=v.shards, torch_files=v.torch_files)
    write_tower(folder / v.path, tower, v)
    session = joined.opened(folder)
    assert session.model.system == "convllava"
    if int(v.config.get("mm_vision_select_layer", -1)) == -2:
        tower.encoder.stages[-1].layers = tower.encoder.stages[-1].layers[:-1]
    path = joined.image(tmp_path, *v.image)
    found = [projector(features(tower, view))[0] for view in views(v, path)]
    expected = joined.greedy(lm, joined.ASK, [torch.cat(found)], 16)
    assert joined.answer_ids(session, joined.ASK, [path], 16) == expected


def test_tower_weights_inside_the_checkpoint_are_ignored(tmp_path: Path) -> None:
    v = Variant((1, 1, 1, 1), (6, 10, 14, 18), 64)
    lm, tower = joined.language_model(), make_tower(v)
    projector = joined.linears(18, 48, 48)
    prefix = "model.vision_tower.vision_tower."
    other = {prefix + k: t + 1 for k, t in tower.state_dict().items()}
    settings = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1,
                "mm_vision_tower": "./tower", "mm_hidden_size": 18}  # fmt: skip
    tensors = joined.below("model.mm_projector.", projector) | other
    joined.write(tmp_path / "convllava", lm, tensors, settings)
    write_tower(tmp_path / "tower", tower, v)
    path = joined.image(tmp_path, 64, 64)
    rows = projector(features(tower, joined.pixels(64, joined.padded(path))))[0]
    expected = joined.greedy(lm, joined.ASK, [rows], 12)
    session = joined.opened(tmp_path / "convllava")
    assert joined.answer_ids(session, joined.ASK, [path], 12) == expected


# -- UniRepLKNet ---------------------------------------------------------------------------------

BRANCHES = {7: ((5, 1), (3, 2), (3, 3)), 13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))}
DIMS = (8, 12, 14, 18, 20)
KERNELS = ((3,), (13,), (13, 3, 3), (7,), (5, 3))
Tensors = dict[str, torch.Tensor]


def lknet_tensors(merged: bool, head: bool) -> Tensors:
    """Random weights of a five-stage tower under the original's names."""
    g = torch.Generator().manual_seed(8)
    w: Tensors = {}

    def add(name: str, *shape: int, mean: float = 0.0, spread: float = 0.3) -> None:
        w[name] = mean + spread * torch.randn(*shape, generator=g)

    def norm(name: str, width: int, batch: bool = False) -> None:
        add(f"{name}.weight", width, mean=1)
        add(f"{name}.bias", width)
        if batch:
            add(f"{name}.running_mean", width)
            w[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=g)
            w[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name: str, out: int, inner: int, k: int, bias: bool = True) -> None:
        add(f"{name}.weight", out, inner, k, k, spread=0.8 * (inner * k * k) ** -0.5)
        if bias:
            add(f"{name}.bias", out)

    half = DIMS[0] // 2
    for number, (out, inner) in {0: (half, 3), 3: (DIMS[0], half)}.items():
        conv(f"downsample_layers.0.{number}", out, inner, 3)
        norm(f"downsample_layers.0.{number + 1}", out)
    for s, d in enumerate(DIMS):
        if s:
            conv(f"downsample_layers.{s}.0", d, DIMS[s - 1], 3)
            norm(f"downsample_layers.{s}.1", d)
        for j, k in enumerate(KERNELS[s]):
            b = f"stages.{s}.{j}"
            large = f"{b}.dwconv.lk_origin" if k >= 7 else f"{b}.dwconv"
            conv(large, d, 1, k, bias=merged)
            if not merged:
                for size, dilation in BRANCHES.get(k, ()):
                    conv(f"{b}.dwconv.dil_conv_k{size}_{dilation}", d, 1, size, bias=False)
                    norm(f"{b}.dwconv.dil_bn_k{size}_{dilation}", d, batch=True)
                if k >= 7:
                    norm(f"{b}.dwconv.origin_bn", d, batch=True)
                norm(f"{b}.norm", d, batch=True)
                norm(f"{b}.pwconv2.2", d, batch=True)
                add(f"{b}.act.1.beta", 1, 1, 1, 4 * d)
                add(f"{b}.gamma", d, mean=0.5)
            conv(f"{b}.se.down", d // 4, d, 1)
            conv(f"{b}.se.up", d, d // 4, 1)
            add(f"{b}.pwconv1.1.weight", 4 * d, d)
            add(f"{b}.pwconv1.1.bias", 4 * d)
            add(f"{b}.act.1.gamma", 1, 1, 1, 4 * d)
            add(f"{b}.pwconv2.0.weight", d, 4 * d, spread=0.1)
            if merged:
                add(f"{b}.pwconv2.0.bias", d)
    norm("norm", DIMS[-1])
    if head:
        add("head.weight", DIMS[-1], DIMS[-1])
        add("head.bias", DIMS[-1])
    return w


def channels(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    """Layer norm over the channels of [B, C, H, W]."""
    x = x.permute(0, 2, 3, 1)
    x = F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    return x.permute(0, 3, 1, 2)


def batch_norm(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    stats = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    return F.batch_norm(x, *stats, w[f"{name}.weight"], w[f"{name}.bias"], False, 0, 1e-5)


def depthwise(w: Tensors, b: str, x: torch.Tensor, k: int, merged: bool) -> torch.Tensor:
    name, d = f"{b}.dwconv.lk_origin" if k >= 7 else f"{b}.dwconv", x.shape[1]
    bias = w[f"{name}.bias"] if merged else None
    y = F.conv2d(x, w[f"{name}.weight"], bias, padding=k // 2, groups=d)
    if merged:
        return y
    if k >= 7:
        y = batch_norm(w, f"{b}.dwconv.origin_bn", y)
        for size, dilation in BRANCHES[k]:
            kernel = w[f"{b}.dwconv.dil_conv_k{size}_{dilation}.weight"]
            pad = (dilation * (size - 1) + 1) // 2
            branch = F.conv2d(x, kernel, padding=pad, dilation=dilation, groups=d)
            y = y + batch_norm(w, f"{b}.dwconv.dil_bn_k{size}_{dilation}", branch)
    return batch_norm(w, f"{b}.norm", y)


def lknet_block(w: Tensors, b: str, x: torch.Tensor, k: int, merged: bool) -> torch.Tensor:
    y = depthwise(w, b, x, k, merged)
    squeezed = y.mean((2, 3), keepdim=True)
    squeezed = F.relu(F.conv2d(squeezed, w[f"{b}.se.down.weight"], w[f"{b}.se.down.bias"]))
    gate = torch.sigmoid(F.conv2d(squeezed, w[f"{b}.se.up.weight"], w[f"{b}.se.up.bias"]))
    y = (y * gate).permute(0, 2, 3, 1)
    y = F.gelu(F.linear(y, w[f"{b}.pwconv1.1.weight"], w[f"{b}.pwconv1.1.bias"]))
    size = y.norm(dim=(1, 2), keepdim=True)
    share = size / (size.mean(-1, keepdim=True) + 1e-6)
    beta = 0 if merged else w[f"{b}.act.1.beta"]
    y = (w[f"{b}.act.1.gamma"] * share + 1) * y + beta
    y = F.linear(y, w[f"{b}.pwconv2.0.weight"], w.get(f"{b}.pwconv2.0.bias"))
    y = y.permute(0, 3, 1, 2)
    if not merged:
        y = batch_norm(w, f"{b}.pwconv2.2", y) * w[f"{b}.gamma"][:, None, None]
    return x + y


def lknet(w: Tensors, x: torch.Tensor, merged: bool) -> torch.Tensor:
    """[1, tokens, width] of the last stage."""

    def down(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)

    first = "downsample_layers.0"
    x = F.gelu(channels(w, f"{first}.1", down(f"{first}.0", x)))
    x = channels(w, f"{first}.4", down(f"{first}.3", x))
    for s, kernels in enumerate(KERNELS):
        if s:
            name = f"downsample_layers.{s}"
            x = channels(w, f"{name}.1", down(f"{name}.0", x))
        for j, k in enumerate(kernels):
            x = lknet_block(w, f"stages.{s}.{j}", x, k, merged)
    return x.flatten(2).transpose(1, 2)


def lknet_checkpoint(work: Path, w: Tensors, file: str) -> tuple[Any, torch.nn.Sequential]:
    """A ConvLLaVA whose tower is a weight file beside it; language model and projector."""
    lm, projector = joined.language_model(), joined.linears(DIMS[-1], 48, 48)
    path = work / "lknet" / file
    path.parent.mkdir()
    if file.endswith("safetensors"):
        save_file(w, path)
    else:
        torch.save(w, path)
    clip_processor(168).save_pretrained(path.parent)
    settings = {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": f"./lknet/{file}",
                "image_aspect_ratio": "pad", "mm_hidden_size": DIMS[-1]}  # fmt: skip
    tensors = joined.below("model.mm_projector.", projector)
    joined.write(work / "convllava", lm, tensors, settings)
    return lm, projector


@pytest.mark.parametrize(
    ("file", "merged", "head"),
    [
        ("unireplknet_l.pth", False, True),
        ("pytorch_model.bin", True, False),
        ("UniRepLKNet.safetensors", False, False),
    ],
)
def test_unireplknet_from_weight_file_to_answer(
    file: str, merged: bool, head: bool, tmp_path: Path
) -> None:
    w = lknet_tensors(merged, head)
    lm, projector = lknet_checkpoint(tmp_path, w, file)
    session = joined.opened(tmp_path / "convllava")
    path = joined.image(tmp_path, 110, 70)
    rows = lknet(w, joined.pixels(168, joined.padded(path)), merged)
    assert rows.shape == (1, 9, DIMS[-1])  # 168 -> 3, rounding up at every stride
    expected = joined.greedy(lm, joined.ASK, [projector(rows)[0]], 16)
    assert joined.answer_ids(session, joined.ASK, [path], 16) == expected


def test_a_file_without_running_statistics_is_refused(tmp_path: Path) -> None:
    w = {k: t for k, t in lknet_tensors(False, False).items() if "running" not in k}
    lknet_checkpoint(tmp_path, w, "lknet.safetensors")
    with pytest.raises(CheckpointError, match="running_mean"):
        systems.load(tmp_path / "convllava", Options())


def test_a_tower_with_a_block_too_few_is_refused(tmp_path: Path) -> None:
    v = Variant((1, 1, 2, 1), (6, 10, 14, 18), 64)
    lm, tower = joined.language_model(), make_tower(v)
    settings = {"mm_projector_type": "linear", "mm_vision_select_layer": -1,
                "mm_vision_tower": "./tower", "mm_hidden_size": 18}  # fmt: skip
    tensors = joined.below("model.mm_projector.", joined.linears(18, 48)[0])
    joined.write(tmp_path / "convllava", lm, tensors, settings)
    write_tower(tmp_path / "tower", tower, v)
    stored = tmp_path / "tower/model.safetensors"
    kept = {k: t for k, t in load_file(stored).items() if "stages.2.layers.1" not in k}
    save_file(kept, stored)
    with pytest.raises(CheckpointError, match=r"stages\.2\.layers\.1"):
        systems.load(tmp_path / "convllava", Options())
    config = json.loads((tmp_path / "convllava/config.json").read_text())
    config["mm_vision_select_layer"] = -3
    (tmp_path / "convllava/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="-3"):
        systems.load(tmp_path / "convllava", Options())
