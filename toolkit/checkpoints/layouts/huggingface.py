"""Hugging Face's checkpoint layout: text_config, vision_config, all components in one file.

Tensor names exist in two generations: language_model.model.* (transformers 4 and what 5 saves)
and model.language_model.* (inside 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.layouts import conversation, towers
from edgevlm.toolkit.checkpoints.layouts.generation import read_eos, read_rules
from edgevlm.toolkit.checkpoints.layouts.source import (
    ComponentTensors,
    Options,
    Source,
    below,
    check,
    embed_from_head,
    find_prefix,
    open_weights,
    read_encoder,
    read_source,
    with_context,
)
from edgevlm.toolkit.checkpoints.layouts.tokenizer_files import check_tokenizer, read_tokenizer
from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess, read_preprocess
from edgevlm.toolkit.models.mergers import mlp
from edgevlm.toolkit.models.recipes import Recipe, flip, keep
from edgevlm.toolkit.strict import Reader, read_json
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.text.tokenizer import token_of
from edgevlm.toolkit.vlm import components, language_models
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig

TOWERS = ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.",
          "model.vision_tower.")  # fmt: skip


@dataclass(frozen=True)
class HuggingFaceRules:
    """What one model class does.

    images: makes the image rules from config.json and the preprocessing. layer, strategy: the
    defaults of vision_feature_layer and vision_feature_select_strategy. ties_by_text: whether
    tie_word_embeddings in text_config alone ties the language model's output to its embedding.
    """

    system: str
    images: Callable[[Reader, ComponentConfig, Preprocess], ImageRules]
    layer: int = -2
    strategy: str = "default"
    ties_by_text: bool = True


CLASSES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
}


def names_class(config: Mapping[str, Any]) -> bool:
    """Whether `architectures` names one of transformers' classes, or model_type belongs to one."""
    classes = config.get("architectures")
    named = isinstance(classes, list) and classes[:1] and str(classes[0]) in CLASSES
    return bool(named) or config.get("model_type") in ("llava_next", "llava_onevision")


def matches(config: Mapping[str, Any], *kinds: str) -> bool:
    """Whether a config.json is of this layout and of one of these model types.

    Keys of LLaVA's own layout beside text_config are leftovers that transformers' classes do not
    read, if `architectures` names such a class.
    """
    plain = "mm_vision_tower" not in config or names_class(config)
    return "text_config" in config and plain and config.get("model_type") in kinds


def require(config: Mapping[str, Any], folder: Path, system: str, *kinds: str) -> None:
    """Raise ConfigError stating what a folder lacks that `system` was chosen for, if it does."""
    if matches(config, *kinds):
        return
    lacks = [] if "text_config" in config else ["text_config (Hugging Face's layout)"]
    lacks += [] if "mm_vision_tower" in config else ["mm_vision_tower (LLaVA's own)"]
    reason = f"lacks {' and '.join(lacks)}" if lacks else f"is not {' or '.join(kinds)}"
    kind = config.get("architectures") or config.get("model_type")
    raise ConfigError(
        f"{folder / 'config.json'} ({kind!r}) is no checkpoint of system {system!r}: it {reason}",
        hint="leave --system out: the system follows from config.json",
    )


def one_view(r: Reader, encoder: ComponentConfig, rule: Preprocess) -> ImageRules:
    """One view of each image: LlavaForConditionalGeneration."""
    return ImageRules({encoder.name: rule})


def load(
    folder: Path, config: Mapping[str, Any], options: Options, rules: HuggingFaceRules
) -> Source:
    """Read a checkpoint. Raises ConfigError and CheckpointError naming what does not fit."""
    r = Reader(config, str(folder / "config.json"), options.ignore_keys)
    lm, encoder = _read_lm(r), _read_encoder(r, options, rules)
    merger = _read_projector(r, encoder, lm)
    home = options.base or folder  # an adapter's folder has neither processor nor tokenizer
    rule = read_processor(home, options)
    towers.check_size(rule, encoder, str(folder))
    images = rules.images(r, encoder, rule)
    token, ties = _image_token(r, config), r.take("tie_word_embeddings", bool, False)
    r.ignore(str(config["model_type"]))
    r.done()
    text, _ = read_tokenizer(home, slow=False)
    check_tokenizer(text, lm.config.vocab_size, str(folder))
    image_text = _image_text(folder, text, token)
    prompts = conversation.huggingface(folder, config, lm.kind, text, base=options.base)

    checkpoint = open_weights(folder, options)
    lm = _tied(lm, ties, rules, checkpoint)
    newline = images.arrangement is not None and images.arrangement.newline
    tensors = _tensors(lm, encoder, merger, newline, checkpoint)
    check(tensors.values(), _unused(lm, encoder))
    model = ModelConfig(
        folder.resolve().name,
        rules.system,
        (encoder,),
        merger,
        with_context(lm, options.max_context),
        images,
        PromptRules(
            prompts.template,
            "token",
            read_eos(home, config, lm.kind, text, config["text_config"]),
            image_text=image_text,
            chat_template=prompts.chat_template,
            special_tokens=prompts.special_tokens,
        ),
        read_rules(home, config, lm.config.vocab_size, options.ignore_keys, config["text_config"]),
    )
    weights = {c.name: tensors[c.name].weights() for c in components.components(model) if c.shapes}
    origin = {"layout": "huggingface", "template": prompts.origin}
    return read_source(model, weights, text, origin, options.packing)


def _read_lm(r: Reader) -> ComponentConfig:
    text = r.sub("text_config")
    known = language_models.MODEL_TYPES
    kind = known[text.choice("model_type", list(known), "llama")]
    config = models.lm(kind).Config.read(text)
    text.ignore("text")
    text.done()
    return ComponentConfig("lm", kind, config)


def _tied(
    lm: ComponentConfig, ties: bool, rules: HuggingFaceRules, checkpoint: Checkpoint
) -> ComponentConfig:
    """The language model with its output tied to its embedding, or not.

    transformers 5 reads tie_word_embeddings from the whole configuration; version 4 read
    it from text_config, and then stored one of the two.
    """
    keys = checkpoint.keys()
    both = all(
        any(key.endswith(end) for key in keys) for end in ("lm_head.weight", "embed_tokens.weight")
    )
    by_text = lm.config.tied and (rules.ties_by_text or not both)
    return replace(lm, config=replace(lm.config, tied=ties or by_text))


def _read_encoder(r: Reader, options: Options, rules: HuggingFaceRules) -> ComponentConfig:
    vision = r.take("vision_config", dict)
    kind, reader = read_encoder(vision, f"{r.where}: vision_config", options)
    stated = r.raw("vision_feature_layer")
    taps = (rules.layer,) if stated is None else towers.selected(stated)
    if taps is None:
        raise ConfigError(
            f"{r.where}: vision_feature_layer = {stated!r} names no layer",
            hint="it is a number such as -2, or a list such as [-2, -5]",
        )
    known = ["default", "full"]
    full = r.choice("vision_feature_select_strategy", known, rules.strategy) == "full"
    parsed = models.encoder(kind).Config.read(reader, taps, full)
    reader.done()
    if not full and not hasattr(parsed, "class_token"):
        raise ConfigError(
            f"{r.where}: vision_feature_select_strategy 'default' drops the first token, and "
            f"{kind} has no class token",
            hint="the original would drop a patch; set the strategy to full",
        )
    return ComponentConfig(kind, kind, parsed)


def _read_projector(r: Reader, encoder: ComponentConfig, lm: ComponentConfig) -> ComponentConfig:
    """Two linears with a GELU between them."""
    r.choice("projector_hidden_act", ["gelu"], "gelu", nullable=False)
    bias = r.take("multimodal_projector_bias", bool, True)
    return ComponentConfig(
        "merger", "mlp", mlp.Config(encoder.config.hidden_sizes, lm.config.hidden_size, 2, bias)
    )


def _image_token(r: Reader, config: Mapping[str, Any]) -> int:
    """The id that stands for an image in a tokenized prompt: as stated, or its class's default."""
    number = r.raw("image_token_index")
    number = r.raw("image_token_id") if number is None else number
    r.skip("image_token_id")
    if not (r.given("image_token_index") or r.given("image_token_id")):
        return 151646 if config["model_type"] == "llava_onevision" else 32000
    if not isinstance(number, int):
        raise ConfigError(
            f"{r.where}: image_token_index = {number!r}, expected the id of the image token",
            hint="tokenizer.json lists it among its added_tokens",
        )
    return number


def _image_text(folder: Path, tokenizer: str, number: int) -> str:
    """The name of the image token. Raises ConfigError if the processor has another one."""
    name, path = token_of(tokenizer, number), folder / "processor_config.json"
    stated = read_json(path).get("image_token") if path.exists() else None
    stated = stated.get("content") if isinstance(stated, dict) else stated
    if stated not in (None, name):
        raise ConfigError(
            f"{path}: image_token = {stated!r}, and the id {number}, which stands for images in "
            f"config.json, is {name!r}",
            hint="set image_token or image_token_index to what the model was trained with",
        )
    return name


def read_processor(folder: Path, options: Options) -> Preprocess:
    """Preprocessing from preprocessor_config.json or processor_config.json.

    Raises CheckpointError where there is neither, and ConfigError for what is not implemented.
    """
    path, combined = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.exists():
        settings = Reader(read_json(path), str(path), options.ignore_keys)
    elif combined.exists() and "image_processor" in read_json(combined):
        settings = Reader(read_json(combined), str(combined), options.ignore_keys).sub(
            "image_processor"
        )
    else:
        raise CheckpointError(
            f"{folder} does not say how images become pixels (preprocessor_config.json)",
            hint="save the processor of the model into the folder too",
        )
    rule = read_preprocess(settings)
    settings.done()
    return rule


# -- tensors -----------------------------------------------------------------------------------


def _tensors(
    lm: ComponentConfig,
    encoder: ComponentConfig,
    merger: ComponentConfig,
    newline: bool,
    checkpoint: Checkpoint,
) -> dict[str, ComponentTensors]:
    tower = models.encoder(encoder.kind)
    vision = _below_first(
        tower.names(encoder.config), tower.shapes(encoder.config), checkpoint, *TOWERS
    )
    roots = ("multi_modal_projector.", "model.multi_modal_projector.")
    shapes = dict(mlp.shapes(merger.config))
    projector = _below_first(_projector_names(merger.config), shapes, checkpoint, *roots)
    if newline:
        name = "model.image_newline" if "model.image_newline" in checkpoint else "image_newline"
        shapes["newline"] = (merger.config.outputs,)
        table = {**projector.table, "newline": keep(name)}
        projector = ComponentTensors(table, shapes, checkpoint)
    return {
        f"encoder.{encoder.name}": vision,
        "merger": projector,
        "lm": _lm_tensors(lm, checkpoint),
    }


def _below_first(
    table: Mapping[str, Recipe],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    *prefixes: str,
) -> ComponentTensors:
    """A component's tensors below the first of `prefixes` that the file uses."""
    return ComponentTensors(
        below(table, find_prefix(table, checkpoint, *prefixes)), shapes, checkpoint
    )


def _projector_names(c: mlp.Config) -> dict[str, Recipe]:
    """The names of the projector's tensors below `multi_modal_projector.`."""
    table = {}
    for i in range(c.layers):
        table[f"linears.{i}.weight"] = flip(f"linear_{i + 1}.weight")
        if c.bias:
            table[f"linears.{i}.bias"] = keep(f"linear_{i + 1}.bias")
    return table


def _lm_tensors(lm: ComponentConfig, checkpoint: Checkpoint) -> ComponentTensors:
    """The language model's tensors, in either generation of names."""
    file = models.lm(lm.kind)
    table = file.names(lm.config)
    new = "model.language_model."
    if any(key.startswith(new) for key in checkpoint.keys()):  # noqa: SIM118
        table = {
            name: replace(r, sources=tuple(s.replace("model.", new, 1) for s in r.sources))
            for name, r in table.items()
        }
    else:
        table = below(table, find_prefix(table, checkpoint, "language_model.", ""))
    return ComponentTensors(embed_from_head(table, checkpoint), file.shapes(lm.config), checkpoint)


def _unused(lm: ComponentConfig, encoder: ComponentConfig) -> list[str]:
    """Globs of tensors that the file may hold and that are not read."""
    of_tower = models.encoder(encoder.kind).unused(encoder.config)
    globs = [prefix + glob for prefix in TOWERS for glob in of_tower]
    return globs + ["*" + glob for glob in models.lm(lm.kind).unused(lm.config)]
