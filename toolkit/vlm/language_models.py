"""The language models that checkpoints and presets name, in one table.

A row says how published configurations call a language model and what belongs to it besides its
weights; `kind` is its file in toolkit/models/lms. A new file there needs one row here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.errors import ConfigError


@dataclass(frozen=True)
class LanguageModel:
    """One row.

    model_type: in its own config.json. llava_types, llava_classes: `model_type` and
    `architectures` of LLaVA checkpoints around it. template: the conversation template that such
    checkpoints were trained with. default_eos: what its configuration class takes where no
    eos_token_id is given. special_tokens: published ids, and answer_ends those of them that end an
    answer; for presets, which have no tokenizer file.
    """

    kind: str
    model_type: str
    llava_types: tuple[str, ...]
    llava_classes: tuple[str, ...]
    template: str
    default_eos: int | None
    special_tokens: Mapping[str, int]
    answer_ends: tuple[int, ...]


_LLAMA_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2}
_QWEN_TOKENS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
_ANY = "llava"  # this model_type means Llama unless `architectures` names another

TABLE = (
    LanguageModel(
        kind="llama",
        model_type="llama",
        llava_types=("llava_llama", _ANY),
        llava_classes=("LlavaLlamaForCausalLM",),
        template="vicuna_v1",
        default_eos=2,
        special_tokens=_LLAMA_TOKENS,
        answer_ends=(2,),
    ),
    LanguageModel(
        kind="qwen2",
        model_type="qwen2",
        llava_types=("llava_qwen", "llava_qwen2"),
        llava_classes=("LlavaQwenForCausalLM", "LlavaQwen2ForCausalLM"),
        template="qwen_1_5",
        default_eos=None,
        special_tokens=_QWEN_TOKENS,
        answer_ends=(151645,),
    ),
    LanguageModel(
        kind="mistral",
        model_type="mistral",
        llava_types=("llava_mistral",),
        llava_classes=("LlavaMistralForCausalLM",),
        template="mistral_instruct",
        default_eos=2,
        special_tokens=_LLAMA_TOKENS,
        answer_ends=(2,),
    ),
)
MODEL_TYPES = {row.model_type: row.kind for row in TABLE}
LLAVA_TYPES = {name: row.kind for row in TABLE for name in row.llava_types}
LLAVA_CLASSES = {name: row.kind for row in TABLE for name in row.llava_classes}


def row(kind: str) -> LanguageModel:
    """The row of the language model in toolkit/models/lms/`kind`.py."""
    return next(row for row in TABLE if row.kind == kind)


def llava_class(config: Mapping[str, Any]) -> str | None:
    """The class in `architectures` if it is one of LLaVA's; None otherwise."""
    classes: Sequence[Any] = config.get("architectures") or ()
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    return name if name in LLAVA_CLASSES else None


def kind_in_llava(config: Mapping[str, Any]) -> str:
    """The kind that the config.json of a LLaVA checkpoint names.

    The class in `architectures` decides: LLaVA-NeXT's training leaves the language model's own
    model_type ("qwen2") in the file whenever it overwrites settings, and "llava" alone is the
    model_type of any of them. Raises ConfigError if both name one, and not the same.
    """
    name, model_type = llava_class(config), config.get("model_type")
    known = LLAVA_TYPES if name is None else LLAVA_TYPES | MODEL_TYPES
    by_type = known.get(str(model_type))
    if by_type is None and (name is None or model_type is not None):
        raise ConfigError(
            f"config.json: architectures {config.get('architectures')!r} and model_type "
            f"{model_type!r} name no LLaVA class that edgevlm implements",
            hint=f"implemented: {', '.join(LLAVA_CLASSES)}",
        )
    by_name = by_type if name is None else LLAVA_CLASSES[name]
    if model_type not in (None, _ANY) and by_type != by_name:
        raise ConfigError(
            f"config.json: architectures names {name}, model_type {model_type!r} is {by_type}'s",
            hint="config.json is of two models; correct the one that is not this checkpoint's",
        )
    return str(by_name)


def ignores_rope_scaling(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's class sets rope_scaling aside, as LlavaQwenForCausalLM does."""
    if kind_in_llava(config) != "qwen2":
        return False
    return "Qwen2" not in (llava_class(config) or "") and config.get("model_type") != "llava_qwen2"


def kind_of(config: Any) -> str:
    """The kind whose file reads configurations of this class."""
    return next(row.kind for row in TABLE if models.lm(row.kind).Config is type(config))
