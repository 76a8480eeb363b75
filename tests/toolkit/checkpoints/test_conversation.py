"""Which conversation template an original checkpoint gets, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit.checkpoints.layouts import conversation
from edgevlm.toolkit.text import templates
from edgevlm.toolkit.text.tokenizer import byte_tokenizer

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
LLAMA = ("<unk>", "<s>", "</s>")

# (folder, kind, added tokens, base model) -> template, reason
CASES: list[tuple[tuple[str, str, tuple[str, ...], str | None], str, str]] = [
    # published names: lmms-lab/llama3-llava-next-8b, liuhaotian/llava-v1.6-34b, ...
    (("llama3-llava-next-8b", "llama", LLAMA_3, None), "llava_llama_3", "<|eot_id|>"),
    (("llava-v1.5-llama-3-8b", "llama", LLAMA_3, None), "llava_llama_3", "<|eot_id|>"),
    (("llava-v1.6-34b", "llama", LLAMA + CHATML, None), "chatml_direct", "<|im_start|>"),
    (("anything", "llama", CHATML, "01-ai/Yi-34B"), "chatml_direct", "<|im_start|>"),
    (("nous-hermes", "mistral", LLAMA + CHATML, None), "mistral_direct", "<|im_start|>"),
    (("llava-v1.6-mistral-7b", "mistral", LLAMA, None), "mistral_instruct", "usual for mistral"),
    (("llava-v1.6-34b", "llama", LLAMA, None), "chatml_direct", "'v1.6-34b' in the folder's name"),
    (("llava-mistral-orca", "mistral", LLAMA + CHATML, None), "mistral_orca", "'orca' in the fold"),
    (("mine", "mistral", LLAMA + CHATML, "Open-Orca/Mistral-7B-OpenOrca"), "mistral_orca",
     "'orca' in _name_or_path"),
    (("llava-v1.6-vicuna-13b", "llama", LLAMA, None), "vicuna_v1", "'v1' in the folder's name"),
    (("v1-of-mine", "mistral", LLAMA, None), "mistral_instruct", "usual for mistral"),
    (("llava-next-interleave-qwen-0.5b", "qwen2", CHATML, None), "qwen_1_5", "usual for qwen2"),
    (("llava-v1.5-7b", "llama", LLAMA, None), "vicuna_v1", "'v1' in the folder's name"),
    (("LLaVA-7B-v0", "llama", LLAMA, None), "llava_v0", "'v0' in the folder's name"),
    (("llava-llama-2-13b-chat-lightning-preview", "llama", LLAMA, None), "llava_llama_2",
     "'llama-2' in the folder's name"),
    (("llava-v1.6-mistral-lora", "llama", LLAMA, None), "mistral_instruct", "'mistral' in"),
    (("mine", "llama", LLAMA, "meta-llama/Llama-2-7b-chat-hf"), "llava_llama_2",
     "'llama-2' in _name_or_path"),
    (("mine", "llama", LLAMA, "lmsys/vicuna-7b-v1.5"), "vicuna_v1", "'vicuna' in _name_or_path"),
    (("llama3-llava-next-8b", "llama", LLAMA, None), "llava_llama_3", "'llama3' in the folder's"),
    (("mine", "llama", LLAMA, "meta-llama/Llama-3.1-8B"), "llava_llama_3", "'llama-3' in _name"),
    (("mine-v0.2", "llama", LLAMA, None), "vicuna_v1", "neither tokens nor names decide"),
    (("llava-llama-30b", "llama", LLAMA, None), "vicuna_v1", "neither tokens nor names decide"),
    (("mine", "llama", LLAMA, None), "vicuna_v1", "neither tokens nor names decide"),
    (("llava-mmfuser", "llama", LLAMA, None), "vicuna_v1", "neither tokens nor names decide"),
]  # fmt: skip


def found(case: tuple[str, str, tuple[str, ...], str | None], root: Path) -> Any:
    folder, kind, tokens, base = case
    text = byte_tokenizer({token: 300 + number for number, token in enumerate(tokens)})
    return conversation.original(root / folder, {"_name_or_path": base}, kind, text)


@pytest.mark.parametrize(("case", "template", "reason"), CASES, ids=lambda c: str(c)[:60])
def test_the_originals_template(case: Any, template: str, reason: str, tmp_path: Path) -> None:
    conversation_of = found(case, tmp_path)
    assert conversation_of.template == template
    assert reason in conversation_of.why
    assert template in templates.TEMPLATES
    assert conversation_of.origin == f"{template} ({conversation_of.why})"
    assert conversation_of.chat_template is None


# (folder, its _name_or_path, adapter's base, base's folder, base's _name_or_path)
# -> template, reason
PARTS: list[tuple[tuple[str, str, str, str, str], str, str]] = [
    # The originals ask the folder's name alone, even where the base says something else.
    (("llava-v1.5-7b-lora", "", "", "Llama-2-7b-chat-hf", ""), "vicuna_v1", "'v1' in the folder's"),
    (("llava-llama-2-7b-lora", "", "", "vicuna-7b-v1.5", ""), "llava_llama_2", "in the folder's"),
    (("mine", "meta-llama/Llama-2-7b-chat", "", "vicuna", ""), "llava_llama_2", "_name_or_path in"),
    (
        ("mine", "", "meta-llama/Llama-2-7b-chat-hf", "b", ""),
        "llava_llama_2",
        "adapter_config.json",
    ),
    (("mine", "", "", "Llama-2-13b-chat-hf", ""), "llava_llama_2", "in the base's name"),
    (("mine", "", "", "LLaVA-7B-v0", ""), "llava_v0", "in the base's name"),
    (
        ("mine", "", "", "copy", "meta-llama/Llama-2-7b"),
        "llava_llama_2",
        "_name_or_path of the base",
    ),
    (("mine", "", "", "copy", ""), "vicuna_v1", "neither tokens nor names decide"),
]


@pytest.mark.parametrize(("case", "template", "reason"), PARTS, ids=lambda c: str(c)[:60])
def test_the_template_of_a_part_and_its_base(
    case: tuple[str, str, str, str, str], template: str, reason: str, tmp_path: Path
) -> None:
    name, path, of_adapter, base_name, base_path = case
    folder, base = tmp_path / "parts" / name, tmp_path / "bases" / base_name
    for place, own in ((folder, path), (base, base_path)):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"_name_or_path": own}))
    adapter = {"base_model_name_or_path": of_adapter or None}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    text = byte_tokenizer({})
    for choose in (conversation.original, conversation.huggingface):
        named = choose(folder, {"_name_or_path": path}, "llama", text, base=base)
        assert named.template == template
        assert reason in named.why
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").write_text("no")
    whole = conversation.huggingface(folder, {}, "llama", text, base=base)
    assert whole.chat_template == "{{ messages }}"


def test_a_model_of_the_hubs_cache_is_called_by_its_id(tmp_path: Path) -> None:
    """Its folder is called by a revision, which says nothing."""
    folder = tmp_path / "models--liuhaotian--llava-llama-2-13b-chat" / "snapshots" / "9f3c0a"
    folder.mkdir(parents=True)
    named = conversation.original(folder, {}, "llama", byte_tokenizer({}))
    assert named.origin == "llava_llama_2 ('llama-2' in the folder's name)"


def test_tokens_of_the_vocabulary_count_like_added_ones(tmp_path: Path) -> None:
    """Yi has <|im_start|> in its vocabulary, and a list of pieces is a vocabulary too."""
    for vocab in ({"<|im_start|>": 6}, [["<|im_start|>", 0.0]]):
        text = json.dumps({"model": {"vocab": vocab}})
        named = conversation.original(tmp_path, {}, "llama", text)
        assert named.template == "chatml_direct"


def test_a_stated_template_wins(tmp_path: Path) -> None:
    text = byte_tokenizer({token: 300 + number for number, token in enumerate(LLAMA_3)})
    named = conversation.original(tmp_path, {}, "llama", text, "plain")
    assert named.origin == "plain (config.json names it)"


def test_without_a_chat_template_hugging_faces_layout_is_chosen_alike(tmp_path: Path) -> None:
    text = byte_tokenizer({token: 300 + number for number, token in enumerate(LLAMA_3)})
    named = conversation.huggingface(tmp_path, {}, "llama", text)
    assert (named.template, named.chat_template) == ("llava_llama_3", None)
    assert named.why == "no chat template in the folder; the tokenizer has <|eot_id|>"


# -- special tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "older", "expected"),
    [
        ({"bos_token": "<a>", "eos_token": {"content": "<b>"}}, {}, {"bos": "<a>", "eos": "<b>"}),
        ({"bos_token": None, "eos_token": "<b>"}, {}, {"eos": "<b>"}),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {}, {"bos": "<s>", "eos": "</s>",
                                                         "unk": "<unk>"}),
        ({"bos_token": "<a>"}, {"bos_token": {"content": "<c>"}}, {"bos": "<c>"}),
        ({"bos_token": "<a>", "added_tokens_decoder": {}}, {"bos_token": "<c>"}, {"bos": "<a>"}),
        ({"image_token": "<image>", "pad_token": "<p>"}, {}, {"pad": "<p>"}),
    ],
)  # fmt: skip
def test_special_tokens_are_those_that_transformers_names(
    config: Any, older: Any, expected: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    named = conversation.huggingface(tmp_path, {}, "llama", byte_tokenizer({}))
    assert named.special_tokens == {f"{name}_token": text for name, text in expected.items()}
