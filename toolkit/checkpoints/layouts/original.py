"""LLaVA's own checkpoint layout: one folder with the LM, the projector and a config.json of `mm_*`.

The vision tower is a Hugging Face folder (or, for UniRepLKNet, a weight file) that
`mm_vision_tower` names. Source: the loaders of haotian-liu/LLaVA and its forks. What a fork does
differently is stated by the `OriginalRules` of its system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.layouts import conversation, huggingface, image_rules, towers
from edgevlm.toolkit.checkpoints.layouts.generation import read_eos, read_rules
from edgevlm.toolkit.checkpoints.layouts.sam import Masks
from edgevlm.toolkit.checkpoints.layouts.source import (
    ComponentTensors,
    NewMerger,
    Options,
    Source,
    below,
    check,
    embed_from_head,
    find_prefix,
    new_tensors,
    open_weights,
    read_source,
    with_context,
)
from edgevlm.toolkit.checkpoints.layouts.tokenizer_files import (
    add_tokens,
    check_tokenizer,
    read_tokenizer,
)
from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.recipes import Recipe, keep, rows_of
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm import components, language_models
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

IN_CHECKPOINT = "model.vision_tower.vision_tower."


@dataclass(frozen=True)
class OriginalRules:
    """What one system does in this layout.

    merger: makes the projector's configuration from config.json, the encoder and the hidden size
    of the language model. tower_wins: tower weights inside the checkpoint override those of the
    tower's folder. lone_newline: an image without tiles also gets the newline token of "unpad".
    taps: chooses the encoder's outputs among the hidden states that config.json selects. tower:
    opens the tower, where it may be missing. masks: reads what makes masks after the answer, for a
    hidden size. keys: of config.json that say nothing that the tensors do not. tokens: edits the
    tokenizer.json.
    """

    system: str
    merger: Callable[[Reader, ComponentConfig, int], ComponentConfig]
    tower_wins: bool = False
    lone_newline: bool = False
    taps: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
    tower: Callable[[Path, Reader, Options, Checkpoint], towers.Tower] | None = None
    masks: Callable[[Checkpoint, int], Masks] | None = None
    keys: tuple[str, ...] = ()
    tokens: Callable[[str], str] = str


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout: a vision tower beside a LLaVA class or model_type.

    The originals' loader takes the class and never looks at model_type, which may be the language
    model's own. Hugging Face's classes may carry the same keys; they do not read them.
    """
    if "mm_vision_tower" not in config or huggingface.names_class(config):
        return False
    by_type = config.get("model_type") in language_models.LLAVA_TYPES
    return by_type or language_models.llava_class(config) is not None


def require(config: Mapping[str, Any], folder: Path, system: str) -> None:
    """Raise ConfigError stating what a folder lacks that `system` was chosen for, if it does."""
    if is_original(config):
        return
    where = folder / "config.json"
    if huggingface.names_class(config) or "mm_vision_tower" not in config:
        kind = config.get("architectures") or config.get("model_type")
        raise ConfigError(
            f"{where} ({kind!r}) is not of LLaVA's own layout, which system {system!r} reads: it "
            f"lacks {missing_keys(config)}",
            hint="leave --system out: the system follows from config.json",
        )
    language_models.kind_in_llava(config)


def missing_keys(config: Mapping[str, Any]) -> str:
    """What keeps a config.json from being of this layout."""
    if "mm_vision_tower" not in config:
        return "mm_vision_tower"
    return f"one of the classes {', '.join(language_models.LLAVA_CLASSES)} in architectures"


def names_mlcd(config: Mapping[str, Any]) -> bool:
    """Whether the tower's name contains "mlcd", by which that fork chooses its tower class."""
    return "mlcd" in str(config.get("mm_vision_tower", "")).lower()


def load(folder: Path, config: Mapping[str, Any], options: Options, rules: OriginalRules) -> Source:
    """Read a checkpoint. Raises ConfigError and CheckpointError naming what does not fit."""
    require(config, folder, rules.system)
    kind = language_models.kind_in_llava(config)
    config = _as_its_class_reads_it(config)
    r = Reader(config, str(folder / "config.json"), options.ignore_keys)
    lm = ComponentConfig("lm", kind, models.lm(kind).Config.read(r))
    tower = _opened_tower(folder, r, options, rules)
    merger = rules.merger(r, tower.encoder, lm.config.hidden_size)
    lone = rules.lone_newline
    images = image_rules.read_rules(r, tower.encoder, merger, tower.preprocess, lone_newline=lone)
    ends_rows = images.arrangement is not None and images.arrangement.newline
    spare = ["model.image_newline"] * ("unpad" in str(config.get("mm_patch_merge_type")))
    wins = _tower_wins(r, rules)
    around = ["<im_start>", "<im_end>"] * r.take("mm_use_im_start_end", bool, False)
    extra = ["<im_patch>"] * r.take("mm_use_im_patch_token", bool, True)
    r.skip(*rules.keys)
    r.ignore("original")
    r.done()
    home = options.base or folder  # a part's folder has no tokenizer
    text, pieces = read_tokenizer(home, slow=True)
    text = rules.tokens(add_tokens(text, [*extra, *around]))
    rows = check_tokenizer(text, lm.config.vocab_size, str(folder), around)
    checkpoint = open_weights(folder, options)
    tensors = _tensors(lm, merger, ends_rows, checkpoint, options.new_merger)
    inside = _tower_inside(tower, checkpoint) if wins else None
    masks = _masks(checkpoint, lm, text, rules)
    tensors |= masks.tensors if masks else {}
    spare += [*(masks.unused if masks else ()), *_unused(lm, merger, inside, tower)]
    check([*tensors.values(), *([inside] if inside else [])], spare)
    if inside is None:
        check([tower.tensors], tower.unused)
    lm, lm_table = shrink_vocab(lm, tensors["lm"].table, rows)
    tensors["lm"] = replace(tensors["lm"], table=lm_table)
    tensors[f"encoder.{tower.encoder.name}"] = inside or tower.tensors
    prompts = conversation.original(folder, config, kind, text, base=options.base)
    model = ModelConfig(
        folder.resolve().name,
        rules.system,
        (tower.encoder,),
        merger,
        with_context(lm, options.max_context),
        images,
        PromptRules(
            prompts.template,
            "pieces",
            read_eos(home, config, kind, text),
            image_text="".join(around[:1] + ["<image>"] + around[1:]),
            sentencepiece=pieces,
        ),
        read_rules(home, config, lm.config.vocab_size, options.ignore_keys),
        masks.config if masks else None,
    )
    origin = {
        "layout": "llava",
        "tower": str(config["mm_vision_tower"]),
        "tower_weights": "checkpoint" if inside else "tower folder",
        "template": prompts.origin,
    }
    return _source(model, tensors, text, origin, options)


def _source(
    model: ModelConfig,
    tensors: Mapping[str, ComponentTensors],
    text: str,
    origin: Mapping[str, str],
    options: Options,
) -> Source:
    weights = {c.name: tensors[c.name].weights() for c in components.components(model) if c.shapes}
    return read_source(model, weights, text, origin, options.packing)


def _opened_tower(folder: Path, r: Reader, options: Options, rules: OriginalRules) -> towers.Tower:
    if rules.tower is None:
        return towers.open_tower(folder, r, options, rules.taps)
    return rules.tower(folder, r, options, open_weights(folder, options))


def _masks(
    checkpoint: Checkpoint, lm: ComponentConfig, text: str, rules: OriginalRules
) -> Masks | None:
    """What makes masks. Raises ConfigError if the tokenizer or the model lacks its token."""
    if rules.masks is None:
        return None
    masks = rules.masks(checkpoint, lm.config.hidden_size)
    number = Tokenizer.from_text(text).id_of(masks.config.token)
    if number is None or number >= lm.config.vocab_size:
        lack = "tokenizer does not know" if number is None else "model has no row for"
        raise ConfigError(
            f"{checkpoint.where}: the {lack} {masks.config.token}, the token of a mask",
            hint="take the tokenizer files that training wrote beside the weights",
        )
    return masks


def _as_its_class_reads_it(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json without what the class of the original drops."""
    drops = language_models.ignores_rope_scaling(config)
    return {**config, "rope_scaling": None} if drops else config


def _tower_wins(r: Reader, rules: OriginalRules) -> bool:
    """Whether tower weights inside the checkpoint override those of the tower's folder.

    Forks with `tower_wins` keep the folder's only if delay_load is set and the tower was not tuned.
    """
    trained = r.take("unfreeze_mm_vision_tower", bool, False)
    late = r.take("delay_load", bool, False)
    tuned = "mm_vision_tower" in str(r.raw("mm_tunable_parts"))
    return trained or (rules.tower_wins and (tuned or not late))


def _tensors(
    lm: ComponentConfig,
    merger: ComponentConfig,
    newline: bool,
    checkpoint: Checkpoint,
    new: NewMerger | None,
) -> dict[str, ComponentTensors]:
    """The language model's and the projector's weights in the LLaVA folder."""
    file, projector = models.lm(lm.kind), models.merger(merger.kind)
    table = dict(projector.names(merger.config))
    if table:  # a single linear is called mm_projector.0 if its type is mlp1x_gelu
        prefixes = ("model.mm_projector.", "model.mm_projector.0.")
        prefix = prefixes[0] if new else find_prefix(table, checkpoint, *prefixes)
        table = below(table, prefix)
    shapes = dict(projector.shapes(merger.config))
    if newline:
        table["newline"] = keep("model.image_newline")
        shapes["newline"] = (lm.config.hidden_size,)
    return {
        "lm": ComponentTensors(
            embed_from_head(file.names(lm.config), checkpoint), file.shapes(lm.config), checkpoint
        ),
        "merger": new_tensors(table, shapes, new(merger, shapes))
        if new
        else ComponentTensors(table, shapes, checkpoint),
    }


def _tower_inside(tower: towers.Tower, checkpoint: Checkpoint) -> ComponentTensors | None:
    """The tower's weights inside the checkpoint; None if there are none."""
    keys = checkpoint.keys()
    if not any(key.startswith(IN_CHECKPOINT) for key in keys):
        return None
    file = models.encoder(tower.encoder.kind)
    table = file.names(tower.encoder.config)
    prefix = find_prefix(table, checkpoint, f"{IN_CHECKPOINT}vision_model.", IN_CHECKPOINT)
    return ComponentTensors(below(table, prefix), file.shapes(tower.encoder.config), checkpoint)


def _unused(
    lm: ComponentConfig,
    merger: ComponentConfig,
    inside: ComponentTensors | None,
    tower: towers.Tower,
) -> list[str]:
    """Globs of tensors in the LLaVA folder that are not read."""
    globs = [*models.lm(lm.kind).unused(lm.config), "model.vision_resampler.*"]
    spare = models.merger(merger.kind).unused(merger.config)
    globs += [f"model.mm_projector.{glob}" for glob in spare]
    if inside is None:
        return [*globs, f"{IN_CHECKPOINT}*"]
    of_tower = models.encoder(tower.encoder.kind).unused(tower.encoder.config)
    return globs + [f"{IN_CHECKPOINT}{p}{g}" for g in of_tower for p in ("", "vision_model.")]


def shrink_vocab(
    lm: ComponentConfig, table: Mapping[str, Recipe], rows: int
) -> tuple[ComponentConfig, dict[str, Recipe]]:
    """The LM with the vocabulary rows that its tokenizer knows, as the originals do."""
    if rows >= lm.config.vocab_size:
        return lm, dict(table)

    cuts = {"embed.weight": 0, "head.weight": 1}
    small = {n: rows_of(r, rows, cuts[n]) if n in cuts else r for n, r in table.items()}
    return replace(lm, config=replace(lm.config, vocab_size=rows)), small
