"""MLCD-Seg (deepglint/unicom, mlcd_vl/downstream): MLCD in LLaVA-NeXT whose answers bring masks.

The state of the language model at each [SEG] of an answer is the prompt of a whole SAM, which is
inside the checkpoint. Reads the layout that its training code writes; neither the file that
`sam_path` names nor the tower's folder is needed. The folder on the hub has code of its own, which
could not be obtained: it is read if its tensors have the same names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit.checkpoints.layouts import original, projectors, sam, towers
from edgevlm.toolkit.checkpoints.layouts.source import ComponentTensors, Options, Source, below
from edgevlm.toolkit.checkpoints.layouts.towers import Tower
from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.images.longest_side import LongestSide
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.images.tiling import Tiling, TokenArrangement
from edgevlm.toolkit.models.encoders import clip
from edgevlm.toolkit.models.encoders import sam as sam_encoder
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import mlp
from edgevlm.toolkit.models.segmenters import sam_decoder
from edgevlm.toolkit.models.taps import resolve_taps
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.vlm import presets
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig, Segmenter

_INSIDE = f"{original.IN_CHECKPOINT}vision_model."
_CLIP_HEAD = 64  # channels of a head in every CLIP of OpenAI's sizes, and in MLCD's


def claims(folder: Path, config: Mapping[str, Any], options: Options) -> bool:
    """Whether a checkpoint folder is of this system: MLCD's, with SAM inside."""
    known = original.is_original(config) or config.get("model_type") == "qwen2"
    named = "mm_vision_tower" in config and original.names_mlcd(config)
    return known and named and sam.segments(folder, config)


def load(folder: Path, config: Mapping[str, Any], options: Options) -> Source:
    """Read a checkpoint folder. Raises ConfigError and CheckpointError naming what is missing."""
    if config.get("model_type") == "qwen2" and not original.is_original(config):
        config = {**config, "architectures": ["LlavaQwenForCausalLM"]}  # code of its own
    return original.load(folder, config, options, _RULES)


def _tower(folder: Path, r: Reader, options: Options, checkpoint: Checkpoint) -> Tower:
    """The tower's folder if it is on this machine; else what its tensors in the checkpoint say."""
    name = towers.name_in({"mm_vision_tower": r.raw("mm_vision_tower")}, r.where)
    try:
        towers.find(name, folder, replace(options, offline=True))
    except CheckpointError:
        if options.vision_tower is not None or f"{_INSIDE}pre_layrnorm.weight" not in checkpoint:
            raise
        return _tower_inside(folder, r, options, checkpoint)
    return towers.open_tower(folder, r, replace(options, offline=True), tuple)


def _tower_inside(folder: Path, r: Reader, options: Options, checkpoint: Checkpoint) -> Tower:
    """A CLIP-class tower by its tensors; heads and activation are those of MLCD-ViT-L-14-336."""
    width, _, patch, _ = checkpoint.shape(f"{_INSIDE}embeddings.patch_embedding.weight")
    patches = checkpoint.shape(f"{_INSIDE}embeddings.position_embedding.weight")[0] - 1
    layer = re.compile(re.escape(f"{_INSIDE}encoder.layers.") + r"(\d+)\.")
    found = [match for match in map(layer.match, checkpoint.keys()) if match]
    depth = 1 + max(int(match[1]) for match in found)
    if width % _CLIP_HEAD:
        raise ConfigError(
            f"{folder}: the tower in the checkpoint has {width} channels, and how many heads it "
            "has stands in its own config.json, which is not here",
            hint="name the tower's folder: --vision-tower FOLDER",
        )
    taps, class_token = towers.read_taps(r, depth)
    config = clip.Config(
        width,
        depth,
        width // _CLIP_HEAD,
        checkpoint.shape(f"{_INSIDE}encoder.layers.0.mlp.fc1.weight")[0],
        patch,
        math.isqrt(patches) * patch,
        class_token=class_token,
    )
    encoder = ComponentConfig("clip", "clip", resolve_taps(config, taps, r.where))
    own = (folder / "preprocessor_config.json").exists()
    rule = towers.read_rule(folder, options) if own else presets.clip_pixels(config.image_size)
    towers.check_size(rule, encoder, str(folder))
    table, shapes = below(clip.names(encoder.config), _INSIDE), clip.shapes(encoder.config)
    return Tower(encoder, rule, ComponentTensors(table, shapes, checkpoint), ())


_RULES = original.OriginalRules(
    "mlcd_seg",
    projectors.linears,
    tower_wins=True,
    lone_newline=True,
    tower=_tower,
    masks=sam.read,
    keys=("sam_path",),
    tokens=sam.with_token,
)

SAM_H = sam_encoder.Config(
    hidden_size=1280,
    num_layers=32,
    num_heads=16,
    intermediate_size=5120,
    patch_size=16,
    image_size=1024,
    window=14,
    global_blocks=(7, 15, 23, 31),
    output_size=256,
)


def _preset(name: str, lm: llama.Config) -> ModelConfig:
    grids = [(1, n) for n in range(1, 5)] + [(2, n) for n in range(1, 4)]
    grids += [(3, 1), (3, 2), (4, 1)]
    tiling = Tiling(tuple((336 * w, 336 * h) for w, h in grids), 336)
    arrangement = TokenArrangement(24, "spatial", unpad=True, newline=True)
    model = presets.model(
        name,
        "mlcd_seg",
        [ComponentConfig("clip", "clip", presets.CLIP_L_336)],
        ComponentConfig("merger", "mlp", mlp.Config((1024,), lm.hidden_size)),
        lm,
        ImageRules({"clip": presets.clip_pixels(336)}, tiling, arrangement),
    )
    decoder = sam_decoder.Config(
        hidden_size=lm.hidden_size,
        projection_size=256,
        width=256,
        grid=SAM_H.grid,
        num_layers=2,
        intermediate_size=2048,
        inner_size=128,
        up_sizes=(64, 32),
        hyper_size=256,
    )
    segmenter = Segmenter(
        sam.TOKEN,
        ComponentConfig("sam", "sam", SAM_H),
        ComponentConfig("sam_decoder", "sam_decoder", decoder),
        LongestSide(SAM_H.image_size),
    )
    return replace(model, segmenter=segmenter)


PRESETS: Mapping[str, Callable[[], ModelConfig]] = presets.with_sibling(
    "mlcd-seg-7b", presets.QWEN_7B, _preset
)
