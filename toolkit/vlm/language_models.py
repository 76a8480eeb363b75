"""The language models that checkpoints and presets name, in one table.

A row says how published configurations call a language model and what belongs to it besides its
weights; `kind` is its file in toolkit/models/lms. A new file there needs one row here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.toolkit import models


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
        llava_types=("llava_qwen",),
        llava_classes=("LlavaQwenForCausalLM",),
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
_CLASSES = {name: row.kind for row in TABLE for name in row.llava_classes}


def row(kind: str) -> LanguageModel:
    """The row of the language model in toolkit/models/lms/`kind`.py."""
    return next(row for row in TABLE if row.kind == kind)


def kind_in_llava(config: Mapping[str, Any]) -> str:
    """The kind that the config.json of a LLaVA checkpoint names.

    "llava" alone is the model_type of any of them; then the class in `architectures` decides.
    """
    classes: Sequence[Any] = config.get("architectures") or ()
    named = _CLASSES.get(str(classes[0])) if classes else None
    model_type = str(config["model_type"])
    return named if named and model_type == _ANY else LLAVA_TYPES[model_type]


def kind_of(config: Any) -> str:
    """The kind whose file reads configurations of this class."""
    return next(row.kind for row in TABLE if models.lm(row.kind).Config is type(config))
