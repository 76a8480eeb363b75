"""The table of language models and the files in toolkit/models/lms describe the same models."""

from __future__ import annotations

import pytest

from edgevlm.toolkit import models
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.text import templates
from edgevlm.toolkit.vlm import language_models
from edgevlm.toolkit.vlm.presets import QWEN_0_5B, VICUNA_7B


def test_every_file_has_one_row_and_every_row_a_file() -> None:
    rows = [row.kind for row in language_models.TABLE]
    assert sorted(rows) == models.kinds("lms")


def test_no_name_means_two_language_models() -> None:
    table = language_models.TABLE
    for names in (
        [row.model_type for row in table],
        [name for row in table for name in row.llava_types],
        [name for row in table for name in row.llava_classes],
    ):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", language_models.TABLE, ids=lambda row: str(row.kind))
def test_a_row_names_a_template_and_tokens_that_exist(row: language_models.LanguageModel) -> None:
    assert row.template in templates.TEMPLATES
    assert set(row.answer_ends) <= set(row.special_tokens.values())
    config = models.lm(row.kind).tiny()
    assert language_models.kind_of(config) == row.kind


def kind(model_type: str | None, *classes: str) -> str:
    return language_models.kind_in_llava({"model_type": model_type, "architectures": list(classes)})


def test_the_class_decides_where_the_model_type_leaves_it_open() -> None:
    assert kind("llava") == "llama"
    assert kind("llava", "LlavaQwenForCausalLM") == "qwen2"
    assert kind("llava", "LlamaForCausalLM") == "llama"
    assert kind("llava_qwen2", "LlavaQwen2ForCausalLM") == "qwen2"
    assert kind(None, "LlavaMistralForCausalLM") == "mistral"
    assert language_models.kind_in_llava({"model_type": "llava", "architectures": None}) == "llama"
    for row in language_models.TABLE:  # saved with the language model's own model_type
        assert kind(row.model_type, row.llava_classes[0]) == row.kind


@pytest.mark.parametrize("model_type", ["llava_mistral", "mistral", "llama"])
def test_a_class_and_a_model_type_that_disagree_are_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match=f"LlavaQwenForCausalLM, model_type '{model_type}'"):
        kind(model_type, "LlavaQwenForCausalLM")


@pytest.mark.parametrize("names", [("qwen2", "Qwen2ForCausalLM"), ("llava_gemma",), (None,)])
def test_names_of_no_llava_class_are_refused(names: tuple[str | None, str]) -> None:
    with pytest.raises(ConfigError, match="name no LLaVA class") as refused:
        kind(*names)
    assert "LlavaQwenForCausalLM" in refused.value.hint


def test_presets_find_their_kind() -> None:
    assert [language_models.kind_of(c) for c in (VICUNA_7B, QWEN_0_5B)] == ["llama", "qwen2"]
