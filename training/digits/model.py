"""The demo's model before it has learned anything: a COMM of small sizes with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess
from edgevlm.toolkit.models.encoders import clip, dinov2
from edgevlm.toolkit.models.lms import llama
from edgevlm.toolkit.models.mergers import comm
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.vlm.components import Component, components
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig
from edgevlm.training import initial
from edgevlm.training.digits.scenes import COUNT, NAME, POINT, SIDE

PATCH = 8  # pixels
WIDTH, DEPTH, HEADS = 96, 2, 4  # of each encoder
LM_WIDTH, LM_DEPTH, LM_HEADS = 96, 3, 3
CONTEXT = 256
_WAVES = np.array([1.0, 0.5, 0.25])  # radians a patch
_PLACE = 4 * len(_WAVES)  # channels of an encoder that hold the place of a patch to begin with
_SIDES = (("[", ","), ("", ","), ("", "]"))  # what is around a left, a top or right, a bottom
_SPECIAL = ("<unk>", "</s>", "[INST]", "[/INST]")
_CUT = r" ?[A-Za-z]+|\[?\d\.\d\d[,\]]?|[\s\S]"  # words, [0.25, and 0.50, and 0.75] and characters


def vocabulary() -> list[str]:
    """Every token: the words of the questions, digits, and 0.00 to 1.00 as parts of a box."""
    words = [COUNT, NAME, POINT]
    parts = [f" {word}" for text in words for word in text.rstrip("?").split()]
    heads = [text.split()[0] for text in words]
    numbers = [f"{before}{i / 100:.2f}{after}" for before, after in _SIDES for i in range(101)]
    tokens = [*_SPECIAL, *"\n ?", *"0123456789", *heads, *parts, *numbers]
    return list(dict.fromkeys(tokens))


def tokenizer() -> str:
    """A tokenizer.json that knows the words of the demo and nothing else."""
    ids = {token: number for number, token in enumerate(vocabulary())}
    added = [
        {
            "id": ids[token],
            "content": token,
            "single_word": False,
            "lstrip": True,  # blanks beside it belong to the template
            "rstrip": True,
            "normalized": False,
            "special": True,
        }
        for token in _SPECIAL
    ]
    cut = {"type": "Split", "pattern": {"Regex": _CUT}, "behavior": "Isolated", "invert": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": cut,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
        }
    )


def configuration() -> ModelConfig:
    """COMM: every level of a CLIP, the deep ones of a DINOv2, merged, into a Llama."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_layers": DEPTH, "num_heads": HEADS}
    sizes |= {"intermediate_size": 3 * WIDTH, "patch_size": PATCH, "image_size": SIDE}
    levels = {"clip": tuple(range(DEPTH)), "dinov2": (DEPTH - 1,)}
    taps = {name: tuple(level + 1 for level in blocks) for name, blocks in levels.items()}
    encoders = (
        ComponentConfig("clip", "clip", clip.Config(**sizes, taps=taps["clip"])),
        ComponentConfig(
            "dinov2",
            "dinov2",
            dinov2.Config(**sizes, trained_image_size=SIDE, taps=taps["dinov2"]),
        ),
    )
    branches = (
        comm.Branch("clip", levels["clip"], WIDTH),
        comm.Branch("dinov2", levels["dinov2"], WIDTH, mlp_depth=1, mlp_ratio=2),
    )
    lm = llama.Config(
        hidden_size=LM_WIDTH,
        num_layers=LM_DEPTH,
        num_heads=LM_HEADS,
        num_kv_heads=LM_HEADS,
        head_dim=LM_WIDTH // LM_HEADS,
        intermediate_size=2 * LM_WIDTH,
        vocab_size=len(vocabulary()),
        context=CONTEXT,
    )
    pixels = Preprocess("bicubic", 1 / 255, (0.0,) * 3, (0.4,) * 3, exact=(SIDE, SIDE))
    return ModelConfig(
        "digits",
        "comm",
        encoders,
        ComponentConfig("merger", "comm", comm.Config(branches, LM_WIDTH, SIDE // PATCH)),
        ComponentConfig("lm", "llama", lm),
        ImageRules({"clip": pixels, "dinov2": pixels}),
        PromptRules("mistral_instruct", "pieces", (vocabulary().index("</s>"),)),
    )


def write(folder: Path, made_by: str, seed: int = 0) -> None:
    """The new model as a checkpoint of edgevlm's own format; made_by: which version writes it."""
    model = configuration()
    parts = [part for part in components(model) if part.shapes]
    weights = {part.name: first_weights(model, part, seed) for part in parts}
    trained.write(
        folder,
        model,
        tokenizer(),
        weights,
        origin={"layout": "new", "seed": seed},
        training={},
        made_by=made_by,
        force=True,
    )


def first_weights(model: ModelConfig, part: Component, seed: int) -> Mapping[str, Array]:
    """What learning begins with: see `_rule`; the merger as in training of published systems."""
    if part.name == "merger":
        return initial.merger(model.merger, part.shapes, seed)
    return initial.Initial(part.shapes, lambda key: _rule(part, key), seed, part.name)


def _rule(part: Component, key: str) -> initial.Draw:
    """Norms and scales of one, biases of zero, normal matrices; places and numbers as waves."""
    leaf = key.rpartition(".")[2]
    if key == "position":
        return lambda _, shape: _places(shape)
    if key == "embed.weight":
        return lambda g, shape: _tokens(g, shape)
    if key == "head.weight":
        return lambda g, shape: _tokens(g, shape[::-1]).T / math.sqrt(shape[0])
    if leaf.startswith("scale") or (leaf == "weight" and "norm" in key):
        return lambda _, shape: np.ones(shape)
    if leaf in ("bias", "class_token"):
        return lambda _, shape: np.zeros(shape)
    if key == "patch.weight":
        return _kernels
    spread = 1 / math.sqrt(part.shapes[key][0])
    if key.endswith(("attention.out.weight", "mlp.down.weight")):
        spread /= 2  # so that what passes by the layers is not drowned
    return lambda g, shape: g.normal(0, spread, shape)


def _waves(at: Array, frequencies: Array) -> Array:
    """Sines, then cosines of numbers (Vaswani et al., arXiv 1706.03762): [numbers, channels]."""
    angles = at[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


def _places(shape: tuple[int, ...]) -> Array:
    """Waves of row and column in the first channels; 0 for the class token."""
    table, side = np.zeros(shape), math.isqrt(shape[0] - 1)
    waves = [_waves(at, _WAVES) for at in np.divmod(np.arange(side * side), side)]
    table[1:, :_PLACE] = np.concatenate(waves, 1)
    return table


def _tokens(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Random rows; those of numbers in boxes are waves, so that near ones begin alike."""
    rows = generator.normal(0, 1, shape)
    words, half = vocabulary(), shape[1] // 2
    frequencies = SIDE / PATCH / 100.0 ** (np.arange(half) / half)
    for before, after in _SIDES:
        ids = [words.index(f"{before}{i / 100:.2f}{after}") for i in range(101)]
        rows[ids] = rows[ids[0]] / 2 + _waves(np.arange(101) / 100, frequencies)
    return rows / 2


def _kernels(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Of the patches, none for the channels that hold their places."""
    kernels = generator.normal(0, 1 / math.sqrt(math.prod(shape[1:])), shape)
    kernels[:_PLACE] = 0
    return kernels
