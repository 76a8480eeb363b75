"""MMFuser with other sizes, levels, projectors and shards, against transformers and plain torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ConfigError
from tests.systems import joined
from tests.systems.test_huggingface import clip_processor, scatter

hf: Any = joined.hf
HEADS, POINTS = 16, 4
TOWER = "model.vision_tower.vision_tower.vision_model."


@dataclass(frozen=True)
class Variant:
    """One checkpoint. width: channels of the tower; side: tokens per row of its grid."""

    width: int = 32
    side: int = 3
    depth: int = 7
    levels: Any = (-6, -5, -4, -3, -2)
    projector: str = "mlp2x_gelu"
    config: dict[str, Any] = field(default_factory=dict)
    lm: dict[str, Any] = field(default_factory=dict)
    shards: int = 1
    torch_files: bool = False
    inside: bool = False
    tower: str = "./clip-vit-tiny"
    image: tuple[int, int] = (97, 60)
    images: int = 1


VARIANTS = {
    "grid of three": Variant(),
    "one head of 12, grid of five, two shards": Variant(
        width=192, side=5, shards=2, lm={"num_key_value_heads": 1}
    ),
    "seven shards, levels as text, mlp3": Variant(
        shards=7, levels="list-7/-5/-4/-3/-2", projector="mlp3x_gelu", width=48, side=4
    ),
    "levels from the front, out of order, mlp1": Variant(
        levels=[1, 4, 2, 0, 5], image=(40, 90), projector="mlp1x_gelu", width=48
    ),
    "levels between are ignored, a tower called otherwise": Variant(
        levels=[-6, -5, -4, -3, -7, 0, -1], tower="towers/clip-large"
    ),
    "linear, torch files, heads of 52": Variant(
        projector="linear", torch_files=True, shards=3,
        lm={"hidden_size": 104, "num_attention_heads": 2},
    ),
    "identity, no padding": Variant(
        projector="identity", width=48, config={"image_aspect_ratio": "square"}, image=(70, 160)
    ),
    "tower inside is ignored": Variant(inside=True),
    "tower inside counts when it was trained": Variant(
        inside=True, config={"unfreeze_mm_vision_tower": True}
    ),
    "two images": Variant(side=2, images=2),
}  # fmt: skip


def make_tower(v: Variant, seed: int) -> Any:
    torch.manual_seed(seed)
    config = hf.CLIPVisionConfig(
        hidden_size=v.width, intermediate_size=40, num_hidden_layers=v.depth,
        num_attention_heads=4, patch_size=14, image_size=14 * v.side, hidden_act="quick_gelu",
    )  # fmt: skip
    tower = hf.CLIPVisionModel(config).eval()
    scatter(tower)
    return tower


def fuser_tensors(d: int) -> dict[str, torch.Tensor]:
    """The fuser's random weights under the original's names."""
    g = torch.Generator().manual_seed(6)
    w: dict[str, torch.Tensor] = {}
    for name in ("gamma1", "gamma2"):
        w[name] = 0.8 * torch.randn(d, generator=g)
    for name in ("query_norm", "feat_norm", "norm1"):
        w[f"{name}.weight"] = 1 + 0.2 * torch.randn(d, generator=g)
        w[f"{name}.bias"] = 0.2 * torch.randn(d, generator=g)
    for module, levels in (("cross_attn", 4), ("self_attn", 1)):
        samples = HEADS * levels * POINTS
        outputs = {"sampling_offsets": 2 * samples, "attention_weights": samples,
                   "value_proj": d, "output_proj": d}  # fmt: skip
        for name, out in outputs.items():
            w[f"{module}.{name}.weight"] = torch.randn(out, d, generator=g) * d**-0.5
            w[f"{module}.{name}.bias"] = 0.5 * torch.randn(out, generator=g)
    return w


def deform(
    w: dict[str, torch.Tensor], module: str, query: torch.Tensor, values: torch.Tensor, levels: int
) -> torch.Tensor:
    """Deformable attention of the e x e grid's cells into `levels` equal grids, per image."""

    def apply(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{module}.{name}.weight"], w[f"{module}.{name}.bias"])

    count, d = query.shape
    e = math.isqrt(count)
    v = apply("value_proj", values).view(levels, count, HEADS, d // HEADS)
    offsets = apply("sampling_offsets", query).view(count, HEADS, levels, POINTS, 2)
    shares = apply("attention_weights", query).view(count, HEADS, levels * POINTS).softmax(-1)
    shares = shares.view(count, HEADS, levels, POINTS)
    cells = (torch.arange(e) + 0.5) / e
    points = torch.stack([cells.repeat(e), cells.repeat_interleave(e)], -1)
    grid = 2 * (points[:, None, None, None] + offsets / e) - 1
    total = torch.zeros(count, HEADS, d // HEADS)
    for level in range(levels):
        maps = v[level].permute(1, 2, 0).reshape(HEADS, d // HEADS, e, e)
        seen = F.grid_sample(
            maps, grid[:, :, level].transpose(0, 1), mode="bilinear", padding_mode="zeros",
            align_corners=False,
        )  # fmt: skip
        total += torch.einsum("hdqp,qhp->qhd", seen, shares[:, :, level])
    return apply("output_proj", total.reshape(count, d))


def fused(w: dict[str, torch.Tensor], levels: list[torch.Tensor]) -> torch.Tensor:
    """[tokens, d] from five levels of the same shape; the last one is the query."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    values = norm("feat_norm", torch.cat(levels[:4]))
    a = deform(w, "cross_attn", norm("query_norm", levels[4]), values, 4)
    n = norm("norm1", a)
    a = a + w["gamma2"] * deform(w, "self_attn", n, n, 1)
    return levels[4] + w["gamma1"] * a


def projector_of(v: Variant, width: int) -> torch.nn.Module:
    """The layers after the fuser in the Sequential, whose numbers begin at 1."""
    if v.projector == "identity":
        return torch.nn.Sequential()
    count = 1 if v.projector == "linear" else int(v.projector[3])
    return joined.linears(v.width, *(width,) * count)


def numbers(v: Variant) -> list[int]:
    raw = v.levels
    return [int(n) for n in raw[4:].split("/")] if isinstance(raw, str) else list(raw)


def write(work: Path, v: Variant) -> tuple[Any, Any, torch.nn.Module, dict[str, torch.Tensor]]:
    """The checkpoint; language model, the tower that is used, projector and fuser."""
    lm, tower, w = joined.language_model(**v.lm), make_tower(v, 3), fuser_tensors(v.width)
    projector = projector_of(v, lm.config.hidden_size)
    tensors = {f"model.mm_projector.0.{k}": t for k, t in w.items()}
    for key, tensor in projector.state_dict().items():
        number, leaf = key.split(".")
        tensors[f"model.mm_projector.{int(number) + 1}.{leaf}"] = tensor
    counts = tower
    if v.inside:
        other = make_tower(v, 4)
        tensors |= joined.below(TOWER, other)
        counts = other if v.config.get("unfreeze_mm_vision_tower") else tower
    settings = {"mm_projector_type": v.projector, "mm_vision_select_layer": v.levels,
                "image_aspect_ratio": "pad", "mm_vision_tower": v.tower,
                "mm_hidden_size": v.width, "ms_cross_attn_lr": None}  # fmt: skip
    folder = work / "llava-mmfuser"
    joined.write(folder, lm, tensors, settings | v.config, shards=v.shards,
                 torch_files=v.torch_files)  # fmt: skip
    folder = work / v.tower
    tower.save_pretrained(folder)
    clip_processor(14 * v.side).save_pretrained(folder)
    return lm, counts, projector, w


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids(name: str, tmp_path: Path) -> None:
    v = VARIANTS[name]
    lm, tower, projector, w = write(tmp_path, v)
    files = [joined.image(tmp_path, *v.image, seed=n) for n in range(v.images)]
    features = []
    for path in files:
        square = v.config.get("image_aspect_ratio") == "square"
        shown = joined.shown(path) if square else joined.padded(path)
        with torch.no_grad():
            states = tower(
                joined.pixels(14 * v.side, shown), output_hidden_states=True
            ).hidden_states
            chosen = [states[n][0, 1:] for n in numbers(v)]
            features.append(projector(fused(w, [*chosen[:4], chosen[-1]])))
    prompt = joined.ASK.replace("<image>", "<image>\n" * (v.images - 1) + "<image>")
    expected = joined.greedy(lm, prompt, features, 16)
    session = joined.opened(tmp_path / "llava-mmfuser")
    assert session.model.system == "mmfuser"
    assert joined.answer_ids(session, prompt, files, 16) == expected


def test_the_fuser_matters_for_these_answers(tmp_path: Path) -> None:
    """With gammas of zero the expected answer differs, so a missing fuser would be noticed."""
    v = VARIANTS["grid of three"]
    lm, tower, projector, w = write(tmp_path, v)
    shown = joined.padded(joined.image(tmp_path, *v.image))
    with torch.no_grad():
        states = tower(joined.pixels(14 * v.side, shown), output_hidden_states=True).hidden_states
        levels = [states[n][0, 1:] for n in numbers(v)]
        with_it, without = projector(fused(w, levels)), projector(levels[-1])
    answers = [joined.greedy(lm, joined.ASK, [rows], 16) for rows in (with_it, without)]
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_vision_select_layer": [-4, -3, -2]},
        {"mm_vision_select_feature": "cls_patch"},
        {"mm_projector_type": "mlp2x_res2x_gelu"},
        {"mm_projector_type": "identity"},  # 32 channels into a language model of 48
        {"mm_vision_select_layer": [-9, -5, -4, -3, -2]},
    ],
)
def test_what_the_fuser_cannot_do_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, Variant())
    path = tmp_path / "llava-mmfuser/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
        systems.load(tmp_path / "llava-mmfuser", Options())
    assert "tensor" not in str(caught.value)
