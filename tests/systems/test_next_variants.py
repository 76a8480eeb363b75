"""MLCD and LLaVA-NeXT in the original layout: towers, tiles, merge types, language models.

The truth: views by Pillow, tokens merged by torch, both as the original code does; modules of
transformers.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from tests.systems import joined
from tests.systems.test_huggingface import scatter

hf: Any = joined.hf
CLIP = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 42,
}
INSIDE = "model.vision_tower.vision_tower."
GRIDS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": GRIDS}
UNPAD = ANYRES | {"mm_patch_merge_type": "spatial_unpad"}
BIGG, LARGE = "mlcd-vit-bigG-patch14-42", "DeepGlint-AI/mlcd-vit-large-patch14-336"


@dataclass(frozen=True)
class Variant:
    """One checkpoint. inside: prefix of other tower weights in it, which override the folder's.

    sizes: of images, each in a question of its own. together: also all in one question. edge: the
    processor resizes to this, and crops.
    """

    system: str
    kind: str
    tower: str
    lm: str
    config: dict[str, Any]
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    inside: str | None = None
    shards: int = 1
    sizes: tuple[tuple[int, int], ...] = ((100, 61),)
    together: bool = False
    edge: int | None = None
    projector: str = "mlp2x_gelu"


TIED = {"tie_word_embeddings": True, "vocab_size": 1024, "num_key_value_heads": 1}
RANGE = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1),...,(2x3)"}
LARGE_TILES = {"patch_size": 56, "image_size": 224}
DEEP = {"num_hidden_layers": 12, "hidden_size": 16, "intermediate_size": 24}

VARIANTS = {
    "mlcd rope, inside, all shapes": Variant(
        "mlcd", "mlcd", BIGG, "qwen2", UNPAD, inside=INSIDE + "vision_model.", shards=3,
        sizes=((130, 31), (29, 115), (64, 64), (9, 7), (211, 100)), together=True,
    ),
    "mlcd rope, heads of 12, tied": Variant(
        "mlcd", "mlcd", BIGG, "qwen2", UNPAD | {"image_aspect_ratio": "anyres_max_1"},
        {"num_attention_heads": 4}, TIED, sizes=((130, 31), (100, 90), (50, 50)),
    ),
    "mlcd clip class, range of tiles": Variant(
        "mlcd", "clip", LARGE, "qwen2", RANGE | {"mm_patch_merge_type": "spatial_unpad"},
        LARGE_TILES, {"num_hidden_layers": 3}, INSIDE, sizes=((300, 190), (100, 400)),
    ),
    "mlcd rope, heads of 104, range, flat, rope scaling dropped": Variant(
        "mlcd", "mlcd", BIGG, "qwen2",
        RANGE | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        LARGE_TILES | {"hidden_size": 208, "num_attention_heads": 2},
    ),
    "pinpoints as text, spatial": Variant(
        "llava_next", "clip", "openai/clip-vit-large-patch14-336", "llama",
        ANYRES | {"mm_patch_merge_type": "spatial", "image_grid_pinpoints": str(GRIDS)},
        inside=INSIDE, text={"vocab_size": 1003, "hidden_size": 40, "num_attention_heads": 2},
    ),
    "flat tiles, two images": Variant(
        "llava_next", "clip", "clip-vit", "mistral", ANYRES, together=True,
        sizes=((60, 20), (80, 81)), text={"sliding_window": None, "rope_theta": 1e6},
    ),
    "flat tiles with class tokens, rope scaling counts for llama": Variant(
        "llava_next", "clip", "clip-vit", "llama",
        ANYRES | {"mm_vision_select_feature": "cls_patch"},
        text={"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "mistral with a window": Variant(
        "llava_next", "clip", "clip-vit", "mistral", UNPAD, text={"sliding_window": 9},
    ),
    "without base": Variant(
        "mlcd", "mlcd", BIGG, "qwen2", ANYRES | {"mm_patch_merge_type": "spatial_unpad_nobase"},
        sizes=((130, 31), (60, 60)),
    ),
    "pooled": Variant(
        "llava_next", "clip", "clip-vit", "qwen2",
        ANYRES | {"mm_patch_merge_type": "spatial_maxpool2x2"}, sizes=((130, 31), (40, 90)),
    ),
    "siglip, anyres_max": Variant(
        "llava_next", "siglip", "google/siglip-so400m-patch14-384", "qwen2",
        UNPAD | {"image_aspect_ratio": "anyres_max_2"}, {"patch_size": 7},
        TIED, INSIDE + "vision_model.", sizes=((200, 90), (31, 90)),
    ),
    "siglip, pad, heads of 40": Variant(
        "llava", "siglip", "siglip-base", "llama", {"image_aspect_ratio": "pad"},
        {"image_size": 45}, {"hidden_size": 80, "num_attention_heads": 2},
    ),
    "lone views end with a newline": Variant(
        "mlcd", "mlcd", BIGG, "qwen2",
        {"image_aspect_ratio": "pad", "mm_patch_merge_type": "spatial_unpad"}, together=True,
        sizes=((100, 61), (20, 40)),
    ),
    "four slices": Variant(
        "mlcd", "mlcd", BIGG, "qwen2", UNPAD | {"mm_vision_select_feature": "slicefour_patch"},
        {"num_hidden_layers": 7},
    ),
    "five chosen layers": Variant(
        "mlcd", "clip", LARGE, "qwen2",
        {"mm_vision_select_feature": "slice_m25811_f6_patch", "image_aspect_ratio": "square"}, DEEP,
    ),
    "resized to more than is cropped": Variant(
        "llava_next", "clip", "clip-vit", "mistral", UNPAD, edge=53
    ),
    "pooler": Variant(
        "llava_next", "clip", "clip-vit", "qwen2",
        ANYRES | {"image_grid_pinpoints": [[84, 168], [168, 84]]},
        {"image_size": 84, "patch_size": 21}, projector="pooler",
    ),
}  # fmt: skip


class Pooler(torch.nn.Module):
    """A convolution of 2 x 2, GELU, linear, under the original's names."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv_pool = torch.nn.Conv2d(inputs, width, 2, 2)
        self.proj = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(x.shape[1])
        grid = x.transpose(1, 2).reshape(len(x), -1, side, side)
        found: torch.Tensor = self.proj(self.conv_pool(grid).flatten(2).transpose(1, 2))
        return found


def make_tower(v: Variant, seed: int) -> Any:
    torch.manual_seed(seed)
    classes = {
        "mlcd": (hf.MLCDVisionModel, hf.MLCDVisionConfig, {"num_attention_heads": 3}),
        "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig, {}),
        "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig, {}),
    }
    model, config, own = classes[v.kind]
    tower = model(config(**(CLIP | own | v.vision))).eval()
    scatter(tower)
    return tower


def processor(v: Variant, size: int) -> Any:
    if v.kind != "siglip":
        from tests.systems.test_huggingface import clip_processor

        made = clip_processor(size)
        made.size = type(made.size)(shortest_edge=v.edge or size)
        return made
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": size, "width": size}, resample=3)


def write_tower(folder: Path, tower: Any, v: Variant) -> None:
    """The folder as published: `vision_model.` before every name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tower.config.to_dict()))
    processor(v, tower.config.image_size).save_pretrained(folder)
    joined.shard(folder, joined.below("vision_model.", tower), 1, False)


# -- the expected answer -------------------------------------------------------------------------


def pinpoints(v: Variant, tile: int) -> list[tuple[int, int]]:
    raw = v.config["image_grid_pinpoints"]
    if "x" in str(raw):  # (1x1),...,(2x3)
        return [(i * tile, j * tile) for i in (1, 2) for j in (1, 2, 3)]
    return [(w, h) for w, h in ast.literal_eval(str(raw))]


def best(size: tuple[int, int], allowed: Sequence[tuple[int, int]]) -> tuple[int, int]:
    scored = []
    for number, (columns, rows) in enumerate(allowed):
        scale = min(columns / size[0], rows / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        scored.append((-kept, columns * rows - kept, number))
    return allowed[min(scored)[2]]


def views(v: Variant, path: Path, tile: int) -> tuple[list[Any], tuple[int, int] | None]:
    """Images for the processor and the grid of tiles (columns, rows)."""
    shown = joined.shown(path)
    aspect = str(v.config.get("image_aspect_ratio"))
    if not aspect.startswith("anyres"):
        grey = (127, 127, 127) if v.kind == "siglip" else (122, 116, 104)
        return [joined.padded(path, grey) if aspect == "pad" else shown], None
    (w, h), (columns, rows) = shown.size, best(shown.size, pinpoints(v, tile))
    if columns / w < rows / h:
        fitted = columns, min(math.ceil(h * (columns / w)), rows)
    else:
        fitted = min(math.ceil(w * (rows / h)), columns), rows
    canvas = Image.new("RGB", (columns, rows))
    canvas.paste(shown.resize(fitted), ((columns - fitted[0]) // 2, (rows - fitted[1]) // 2))
    corners = [(x, y) for y in range(0, rows, tile) for x in range(0, columns, tile)]
    boxes = [(x, y, x + tile, y + tile) for x, y in corners]
    tiles = [canvas.crop(box) for box in boxes]
    whole = v.edge or tile
    return [shown.resize((whole, whole)), *tiles], (columns // tile, rows // tile)


def chosen(v: Variant, states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hidden states of one view that mm_vision_select_feature selects."""
    feature = v.config.get("mm_vision_select_feature", "patch")
    if feature.startswith("slicefour"):
        step = len(states) // 4
        x = torch.cat([states[i] for i in range(step - 2, len(states), step)], -1)
    elif feature.startswith("slice_m"):
        x = torch.cat([states[i] for i in (-2, -5, -8, -11, 6)], -1)
    else:
        x = states[-2]
    return x if v.kind == "siglip" or feature == "cls_patch" else x[:, 1:]


def merged(
    v: Variant, f: torch.Tensor, grid: tuple[int, int] | None, size: tuple[int, int],
    newline: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """[tokens, width] from the views' features [views, n * n, width]."""
    merge = v.config.get("mm_patch_merge_type", "flat")
    if merge == "flat":
        return f.flatten(0, 1)
    if grid is None:
        return torch.cat([f[0], newline[None]]) if "unpad" in merge else f[0]
    (columns, rows), n = grid, math.isqrt(f.shape[1])
    x = f[1:].reshape(rows, columns, n, n, -1).permute(4, 0, 2, 1, 3)
    x = x.reshape(f.shape[2], rows * n, columns * n)
    if "maxpool2x2" in merge:
        x = F.max_pool2d(x, 2)
    elif "unpad" in merge:
        x = unpadded(x, size)
        limit = str(v.config["image_aspect_ratio"]).partition("_max_")[2]
        times = math.sqrt(x.shape[1] * x.shape[2] / (int(limit or 999) * n * n))
        if times > 1.1:
            wanted = [int(x.shape[1] // times), int(x.shape[2] // times)]
            x = F.interpolate(x[None], wanted, mode="bilinear", align_corners=False)[0]
        x = torch.cat([x, newline[:, None, None].expand(-1, x.shape[1], 1)], 2)
    x = x.flatten(1).T
    return x if "nobase" in merge else torch.cat([f[0], x])


def unpadded(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Without the rows or columns that show the black padding."""
    (w, h), (rows, columns) = size, x.shape[1:]
    if w / h > columns / rows:
        pad = (rows - int(h * (columns / w))) // 2
        return x[:, pad : rows - pad]
    pad = (columns - int(w * (rows / h))) // 2
    return x[:, :, pad : columns - pad]


def features(
    v: Variant, tower: Any, projector: Any, newline: torch.Tensor, path: Path
) -> torch.Tensor:
    size = tower.config.image_size
    seen, grid = views(v, path, size)
    with torch.no_grad():
        pixels = processor(v, size)(seen, return_tensors="pt")["pixel_values"]
        states = tower(pixels, output_hidden_states=True).hidden_states
        f = projector(chosen(v, states))
        return merged(v, f, grid, joined.shown(path).size, newline)


# -- tests ---------------------------------------------------------------------------------------


def write(work: Path, v: Variant) -> tuple[Any, Any, Any, torch.Tensor]:
    """The checkpoint; language model, the tower that is used, projector, newline."""
    lm, tower = joined.language_model(v.lm, **v.text), make_tower(v, 3)
    width = lm.config.hidden_size
    own = str(v.config.get("mm_vision_select_feature"))
    times = 4 if "four" in own else 5 if "m25811" in own else 1
    projector: Any = joined.linears(times * tower.config.hidden_size, width, width)
    if v.projector == "pooler":
        projector = Pooler(tower.config.hidden_size, width).eval()
        scatter(projector)
    newline = torch.randn(width, generator=torch.Generator().manual_seed(1))
    tensors = joined.below("model.mm_projector.", projector)
    if "unpad" in v.config.get("mm_patch_merge_type", ""):
        tensors["model.image_newline"] = newline
    write_tower(work / v.tower, tower, v)
    if v.inside:
        tower = make_tower(v, 4)
        tensors |= joined.below(v.inside, tower)
    settings = {"mm_projector_type": v.projector, "mm_vision_tower": v.tower,
                "mm_hidden_size": times * tower.config.hidden_size,
                "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}  # fmt: skip
    folder = work / "checkpoint"
    joined.write(folder, lm, tensors, settings | v.config, shards=v.shards)
    return lm, tower, projector, newline


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids(name: str, tmp_path: Path) -> None:
    v = VARIANTS[name]
    lm, tower, projector, newline = write(tmp_path, v)
    session = joined.opened(tmp_path / "checkpoint")
    assert session.model.system == v.system
    prompt = joined.ASK_QWEN if v.lm == "qwen2" else joined.ASK
    files = [joined.image(tmp_path, w, h, seed=n) for n, (w, h) in enumerate(v.sizes)]
    found = [features(v, tower, projector, newline, path) for path in files]
    for path, rows in zip(files, found, strict=True):
        expected = joined.greedy(lm, prompt, [rows], 12)
        assert joined.answer_ids(session, prompt, [path], 12) == expected, path.name
    if v.together:
        several = prompt.replace("<image>", "<image>\n" * (len(files) - 1) + "<image>")
        expected = joined.greedy(lm, several, found, 12)
        assert joined.answer_ids(session, several, files, 12) == expected


def test_text_alone(tmp_path: Path) -> None:
    v = VARIANTS["mlcd rope, heads of 12, tied"]
    lm, *_ = write(tmp_path, v)
    prompt = "<|im_start|>user\nWhat is an image?<|im_end|>\n<|im_start|>assistant\n"
    expected = joined.greedy(lm, prompt, [], 16)
    assert joined.answer_ids(joined.opened(tmp_path / "checkpoint"), prompt, [], 16) == expected


def test_where_tower_weights_come_from(tmp_path: Path) -> None:
    late: dict[str, Any] = {"delay_load": True, "mm_tunable_parts": "mm_mlp_adapter"}
    cases: list[tuple[str | None, dict[str, Any], str]]
    cases = [(None, {}, "tower folder"), (INSIDE, {}, "checkpoint"), (INSIDE, late, "tower folder"),
             (INSIDE, {"delay_load": True}, "checkpoint")]  # fmt: skip
    for number, (inside, changes, origin) in enumerate(cases):
        work = tmp_path / str(number)
        write(work, Variant("mlcd", "mlcd", BIGG, "qwen2", UNPAD | changes, inside=inside))
        source = systems.load(work / "checkpoint", Options())
        assert source.origin["tower_weights"] == origin
