"""Four small vision-language models that are trained from nothing on small square pictures.

Each has the parts of its published system: ConvLLaVA a ConvNeXt of five stages, MMFuser a fuser
over five levels of CLIP, COMM the merged levels of CLIP and DINOv2, MLCD its rotary vision
transformer with LLaVA-NeXT's newline. The language models are Llama, Mistral and Qwen2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess
from edgevlm.toolkit.images.tiling import TokenArrangement
from edgevlm.toolkit.models import lm as lm_file
from edgevlm.toolkit.models.encoders import clip, convnext, dinov2, mlcd
from edgevlm.toolkit.models.mergers import comm, mlp, mmfuser
from edgevlm.toolkit.text import templates
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.vlm import language_models
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig
from edgevlm.training import initial

SYSTEMS = ("convllava", "mmfuser", "comm", "mlcd")
_HALF, _QUARTER = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_ROWS = 512  # of the embedding
_LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
_SPECIAL = {
    "llama": _LLAMA_TOKENS,
    "mistral": _LLAMA_TOKENS,
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
# Mistral's prompt is the shortest, which lets the few tokens of a ConvNeXt stand out.
LANGUAGE_MODELS = {"convllava": "mistral", "mmfuser": "llama", "comm": "llama", "mlcd": "qwen2"}


@dataclass(frozen=True)
class Sizes:
    """side: of pictures, in pixels; patch: of the transformers; width: channels of a token.

    layers: blocks of a lone transformer; each of COMM's two has pair_layers. depths, dims: of the
    ConvNeXt, whose first kernel has `stem` pixels and whose tokens stand for 16 times as many.
    """

    side: int = 32
    patch: int = 4
    width: int = 64
    heads: int = 2
    layers: int = 5
    pair_layers: int = 3
    depths: tuple[int, ...] = (1, 2, 4, 1, 1)
    dims: tuple[int, ...] = (16, 32, 64, 128, 192)
    stem: int = 1
    lm_width: int = 64
    lm_layers: int = 2

    @property
    def grid(self) -> int:
        """Tokens per row of a transformer."""
        return self.side // self.patch


def model(system: str, sizes: Sizes) -> ModelConfig:
    """The configuration of a small model of `system`."""
    encoders, merger, arrangement = _VISION[system](sizes)
    kind = LANGUAGE_MODELS[system]
    rule = Preprocess(
        "bicubic", 1 / 255, _HALF, _QUARTER, short_edge=sizes.side, crop=(sizes.side, sizes.side)
    )
    images = ImageRules({e.name: rule for e in encoders}, arrangement=arrangement)
    ends = (_SPECIAL[kind].index("<|im_end|>" if kind == "qwen2" else "</s>"),)
    prompts = PromptRules(language_models.row(kind).template, "pieces", ends)
    lm = ComponentConfig("lm", kind, _lm(kind, sizes))
    return ModelConfig(f"{system}-small", system, encoders, merger, lm, images, prompts)


Vision = tuple[tuple[ComponentConfig, ...], ComponentConfig, "TokenArrangement | None"]


def _lm(kind: str, s: Sizes) -> Any:
    heads = max(s.lm_width // 32, 1)
    return lm_file(kind).Config(
        hidden_size=s.lm_width,
        num_layers=s.lm_layers,
        num_heads=heads,
        num_kv_heads=1 if kind == "qwen2" else heads,
        head_dim=s.lm_width // heads,
        intermediate_size=2 * s.lm_width,
        vocab_size=_ROWS,
        context=256,
        qkv_bias=kind == "qwen2",
        tied=True,
    )


def _transformer(s: Sizes, layers: int, taps: Sequence[int]) -> dict[str, Any]:
    return {
        "hidden_size": s.width,
        "num_layers": layers,
        "num_heads": s.heads,
        "intermediate_size": 3 * s.width,
        "patch_size": s.patch,
        "image_size": s.side,
        "taps": tuple(taps),
    }


def _convllava(s: Sizes) -> Vision:
    tower = convnext.Config(s.depths, s.dims, patch=s.stem, image_size=s.side)
    merger = mlp.Config((tower.dims[-1],), s.lm_width)
    encoder = ComponentConfig("convnext", "convnext", tower)
    return (encoder,), ComponentConfig("merger", "mlp", merger), None


def _mmfuser(s: Sizes) -> Vision:
    levels = mmfuser.LEVELS + 1
    tower = clip.Config(**_transformer(s, s.layers, range(s.layers - levels + 1, s.layers + 1)))
    merger = mmfuser.Config(s.width, s.grid, s.lm_width, num_heads=s.heads, num_points=2)
    encoder = ComponentConfig("clip", "clip", tower)
    return (encoder,), ComponentConfig("merger", "mmfuser", merger), None


def _comm(s: Sizes) -> Vision:
    count = s.pair_layers
    levels = {"clip": tuple(range(count)), "dinov2": tuple(range(count // 2, count))}
    shapes = {n: _transformer(s, count, [i + 1 for i in taken]) for n, taken in levels.items()}
    encoders = (
        ComponentConfig("clip", "clip", clip.Config(**shapes["clip"])),
        ComponentConfig(
            "dinov2", "dinov2", dinov2.Config(**shapes["dinov2"], trained_image_size=s.side)
        ),
    )
    branches = tuple(
        comm.Branch(name, taken, s.width, mlp_depth=int(name == "dinov2"), mlp_ratio=2)
        for name, taken in levels.items()
    )
    merger = comm.Config(branches, s.lm_width, s.grid)
    return encoders, ComponentConfig("merger", "comm", merger), None


def _mlcd(s: Sizes) -> Vision:
    shape = _transformer(s, s.layers, (s.layers,)) | {"image_size": (s.side, s.side)}
    tower = mlcd.Config(**shape)
    merger = ComponentConfig("merger", "mlp", mlp.Config((s.width,), s.lm_width))
    arrangement = TokenArrangement(s.grid, "spatial", unpad=True, newline=True)
    return (ComponentConfig("mlcd", "mlcd", tower),), merger, arrangement


_VISION = {"convllava": _convllava, "mmfuser": _mmfuser, "comm": _comm, "mlcd": _mlcd}


# -- the tokenizer, the checkpoint ---------------------------------------------------------------


def tokenizer(kind: str, texts: Iterable[str]) -> str:
    """A tokenizer.json of byte pairs that has the words of `texts` and of the template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    own = templates.find(language_models.row(kind).template)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_ROWS,
        special_tokens=list(_SPECIAL[kind]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*texts, *own.literals.split("\0")] * 2, trainer)
    if "<s>" in _SPECIAL[kind]:
        begin = ("<s>", _SPECIAL[kind].index("<s>"))
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[begin]
        )
    return json.dumps(json.loads(made.to_str()))


def write(folder: Path, system: str, sizes: Sizes, texts: Iterable[str], seed: int = 0) -> None:
    """Write an untrained model of `system` as a checkpoint of edgevlm's own format.

    texts: questions and answers, whose words become tokens.
    """
    config = model(system, sizes)
    trained.write(
        folder,
        config,
        tokenizer(config.lm.kind, texts),
        initial.whole(config, seed),
        origin={"initial": seed},
        training={},
        made_by="benchmarks",
    )
