"""The training stages of the published systems, as data.

Sources: the scripts and papers of haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT, deepglint/unicom,
alibaba/conv-llava and yuecao0119/MMFuser; COMM from arXiv 2310.08825, whose code was not published.
docs/training.md shows how each is run, and what differs from the original.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.towers.stages import STAGES as TOWER_STAGES
from edgevlm.training.towers.stages import TowerStage

Views = Literal["model", "square", "pad"]
TOWER = "vision tower"  # the system of stages that train one by itself
_COMM = "arXiv 2310.08825, sections 3 and 4.1"


@dataclass(frozen=True)
class Part:
    """Parameters whose name matches the glob: their learning rate, or that they are frozen.

    rate None: the stage's own. Names are COMPONENT.TENSOR, such as lm.layers.0.mlp.up.weight.
    optional: a model need not have such parameters.
    """

    names: str
    rate: float | None = None
    frozen: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage of a published recipe.

    trained: what is trained, of several matches the last holds; everything else is frozen.
    batch: samples of an optimizer step over all processes. max_length: positions of a sample.
    text: "plain" for captions without a conversation, "template" for the model's own conversation
    template, which is the one that the published stage names. views: how
    images are shown, where "model" is the model's own rule. grouped: batches of similar length and
    of one modality. warmup: share of the steps. fifth_stage: blocks and channels of the stage that
    is appended to a four-stage ConvNeXt first.
    """

    name: str
    systems: tuple[str, ...]
    purpose: str
    trained: tuple[Part, ...]
    rate: float
    batch: int
    source: str
    text: Literal["plain", "template"] = "template"
    views: Views = "model"
    max_length: int = 2048
    grouped: bool = False
    warmup: float = 0.03
    weight_decay: float = 0.0
    epochs: float = 1.0
    fifth_stage: tuple[int, int] | None = None

    def part_of(self, name: str) -> Part | None:
        """The rule for a parameter; None if it is frozen."""
        matching = [part for part in self.trained if fnmatchcase(name, part.names)]
        return matching[-1] if matching and not matching[-1].frozen else None

    def rate_of(self, name: str) -> float | None:
        """The learning rate of a parameter; None if it is frozen."""
        part = self.part_of(name)
        return None if part is None else self.rate if part.rate is None else part.rate


# The token that ends rows of image tokens is trained with the language model, not the projector.
_PROJECTOR = (Part("merger.*"), Part("merger.newline", frozen=True, optional=True))
_PROJECTOR_AND_LM = (Part("merger.*"), Part("lm.*"))
_WITH_TOWER = (*_PROJECTOR_AND_LM, Part("encoder.*", 2e-6))
# Nothing trains the map's positions, which the original keeps as a buffer.
_SEGMENTING = (
    *_WITH_TOWER,
    Part("segmenter.decoder.*", 8e-4),
    Part("segmenter.decoder.projection.*", 3e-4),
    Part("segmenter.decoder.position", frozen=True),
)
_NEXT = ("llava_next", "mlcd")

STAGES = (
    Stage(
        "llava-pretrain",
        ("llava",),
        "projector pre-training on captions",
        _PROJECTOR,
        1e-3,
        256,
        "LLaVA scripts/v1_5/pretrain.sh",
        text="plain",
        views="square",
    ),
    Stage(
        "llava-finetune",
        ("llava",),
        "instruction tuning of projector and language model",
        _PROJECTOR_AND_LM,
        2e-5,
        128,
        "LLaVA scripts/v1_5/finetune.sh",
        views="pad",
        grouped=True,
    ),
    Stage(
        "next-pretrain",
        _NEXT,
        "stage 1 of LLaVA-NeXT and MLCD: projector pre-training on captions, single views",
        _PROJECTOR,
        1e-3,
        128,
        "unicom mlcd_vl/scripts/pretrain_mlcd.sh",
        text="plain",
        views="square",
        max_length=8192,
    ),
    Stage(
        "next-finetune",
        _NEXT,
        "stage 2 of LLaVA-NeXT and MLCD: tower, projector and language model on tiled images",
        _WITH_TOWER,
        1e-5,
        128,
        "unicom mlcd_vl/scripts/finetune_mlcd.sh",
        max_length=32768,
        grouped=True,
    ),
    Stage(
        "next-onevision",
        _NEXT,
        "OneVision stage of MLCD-Embodied: single images, several images and text",
        _WITH_TOWER,
        1e-5,
        16,
        "unicom mlcd_vl/scripts/finetune_ov.sh",
        max_length=32768,
        grouped=True,
    ),
    Stage(
        "mlcd-seg",
        ("mlcd_seg",),
        "MLCD-Seg: tower, projector, language model and mask decoder; SAM's encoder is frozen",
        _SEGMENTING,
        2e-5,
        128,
        "unicom mlcd_vl/downstream/scripts/finetune_mlcd_onlyseg.sh",
        max_length=6000,
    ),
    Stage(
        "convllava-projector",
        ("convllava",),
        "stage 1: a fifth stage is appended; it, the projector and the output layer are trained",
        (Part("merger.*"), Part("encoder.*.stages.4.*"), Part("lm.head.*", optional=True)),
        3e-4,
        256,
        "conv-llava, scripts of stage 1",
        views="pad",
        grouped=True,
        fifth_stage=(6, 3072),
    ),
    Stage(
        "convllava-pretrain",
        ("convllava",),
        "stage 2: the tower from its third stage on, projector and language model",
        (*_PROJECTOR_AND_LM, Part("encoder.*.stages.[234].*")),
        2e-5,
        256,
        "conv-llava, docs and arXiv 2405.15738 (the script states 1e-3)",
        views="pad",
        grouped=True,
    ),
    Stage(
        "convllava-finetune",
        ("convllava",),
        "stage 3: instruction tuning of projector and language model",
        _PROJECTOR_AND_LM,
        2e-5,
        128,
        "conv-llava, scripts of stage 3",
        views="pad",
        grouped=True,
    ),
    Stage(
        "mmfuser-pretrain",
        ("mmfuser",),
        "fuser and projector pre-training on captions",
        _PROJECTOR,
        1e-3,
        256,
        "MMFuser scripts/mmfuser/pretrain.sh",
        text="plain",
        views="square",
    ),
    Stage(
        "mmfuser-finetune",
        ("mmfuser",),
        "instruction tuning of fuser, projector and language model",
        _PROJECTOR_AND_LM,
        2e-5,
        128,
        "MMFuser scripts/mmfuser/finetune.sh",
        views="pad",
        grouped=True,
    ),
    Stage(
        "comm-pretrain",
        ("comm",),
        "stage 1: merger and language model on captions, questions and grounding",
        _PROJECTOR_AND_LM,
        2e-5,
        64,
        _COMM,
        views="pad",
    ),
    Stage(
        "comm-finetune",
        ("comm",),
        "stage 2: instruction tuning of merger and language model",
        _PROJECTOR_AND_LM,
        2e-5,
        64,
        _COMM,
        views="pad",
    ),
    Stage(
        "all",
        (),
        "every parameter at one rate: small models from scratch, experiments",
        (Part("*"),),
        1e-3,
        32,
        "no published recipe",
    ),
)


def find(name: str) -> Stage | TowerStage:
    """The stage called `name`, of a whole model or of a vision tower by itself.

    Raises ConfigError naming the nearest ones.
    """
    known: dict[str, Stage | TowerStage] = {stage.name: stage for stage in STAGES}
    known |= TOWER_STAGES
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, 3, 0.4) or sorted(known)
    raise ConfigError(
        f"there is no training stage {name!r}",
        hint=f"near: {', '.join(close)}; edgevlm train list shows all",
    )


def find_vlm(name: str) -> Stage:
    """The stage of a whole model called `name`. Raises ConfigError."""
    stage = find(name)
    if isinstance(stage, TowerStage):
        raise ConfigError(f"stage {name} trains a vision tower by itself, not a whole model")
    return stage


def find_tower(name: str) -> TowerStage:
    """The stage of a vision tower called `name`. Raises ConfigError."""
    stage = find(name)
    if isinstance(stage, Stage):
        raise ConfigError(f"stage {name} trains a whole model, not a vision tower by itself")
    return stage


@dataclass(frozen=True)
class Row:
    """A line of `edgevlm train list`. systems: of whose models; empty for any."""

    name: str
    systems: tuple[str, ...]
    purpose: str
    rate: float
    batch: int


def listed() -> list[Row]:
    """All stages, those of whole models first."""
    rows = [Row(s.name, s.systems, s.purpose, s.rate, s.batch) for s in STAGES]
    for s in TOWER_STAGES.values():
        rows.append(Row(s.name, (TOWER,), s.purpose, s.learning_rate, s.global_batch))
    return rows


def check_system(stage: Stage, system: str) -> None:
    """Raise ConfigError if a stage is of another system than the model."""
    if not stage.systems or system in stage.systems:
        return
    fitting = [other.name for other in STAGES if not other.systems or system in other.systems]
    raise ConfigError(
        f"stage {stage.name} is for {' and '.join(stage.systems)}, the model is {system}",
        hint=f"stages of {system}: {', '.join(fitting)}",
    )


def matches_something(stage: Stage, names: Sequence[str]) -> None:
    """Raise ConfigError if a rule of a stage names no parameter of the model."""
    for part in stage.trained:
        if not part.optional and not any(fnmatchcase(n, part.names) for n in names):
            raise ConfigError(
                f"stage {stage.name} trains {part.names}, the model has no such parameter",
                hint="is the stage the right one? docs/training.md lists what each expects",
            )
