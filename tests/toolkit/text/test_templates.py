"""The templates' exact strings, one turn and several, against the originals' rules."""

from __future__ import annotations

import re

import pytest

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.text import templates

USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able "
    "to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language.The visual content will be provided with the following "
    "format: <Image>visual content</Image>."
)
META = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)
LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
QWEN = "You are a helpful assistant."
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"

# name -> (after the question "Q", after the turns "Q", "A", "R")
EXACT = {
    "vicuna_v1": (
        f"{USER} USER: Q ASSISTANT:",
        f"{USER} USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    ),
    "v1": (
        f"{USER} USER: Q ASSISTANT:",
        f"{USER} USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    ),
    "llava_v1": (
        f"{HUMAN} USER: Q ASSISTANT:",
        f"{HUMAN} USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    ),
    "llava_v0": (
        f"{HUMAN}###Human: Q###Assistant:",
        f"{HUMAN}###Human: Q###Assistant: A###Human: R###Assistant:",
    ),
    "v0_mmtag": (
        f"{MMTAG}###Human: Q###Assistant:",
        f"{MMTAG}###Human: Q###Assistant: A###Human: R###Assistant:",
    ),
    "v1_mmtag": (
        f"{MMTAG} USER: Q ASSISTANT:",
        f"{MMTAG} USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    ),
    "llama_2": (
        f"[INST] <<SYS>>\n{META}\n<</SYS>>\n\nQ [/INST]",
        f"[INST] <<SYS>>\n{META}\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]",
    ),
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{LANGUAGE_AND_VISION}\n<</SYS>>\n\nQ [/INST]",
        f"[INST] <<SYS>>\n{LANGUAGE_AND_VISION}\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]",
    ),
    "mistral_instruct": ("[INST] Q [/INST]", "[INST] Q [/INST] A </s>[INST] R [/INST]"),
    "mpt": (
        f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n",
        f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n"
        "A<|im_end|><|im_start|>user\nR<|im_end|><|im_start|>assistant\n",
    ),
    "qwen_1_5": (
        f"<|im_start|>system\n{QWEN}<|im_end|>\n<|im_start|>user\nQ{ANSWER}",
        f"<|im_start|>system\n{QWEN}<|im_end|>\n<|im_start|>user\nQ{ANSWER}"
        f"A<|im_end|>\n<|im_start|>user\nR{ANSWER}",
    ),
    "mlcd_chat": (
        f"<|im_start|>system{QWEN}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n",
        f"<|im_start|>system{QWEN}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n",
    ),
    "plain": ("Q\n", "Q\nA\nR\n"),  # several turns are refused, see test_every_prompt.py
}
DIRECT = "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"
EXACT["llava_v0_mmtag"], EXACT["llava_v1_mmtag"] = EXACT["v0_mmtag"], EXACT["v1_mmtag"]
EXACT["v0_plain"] = EXACT["plain"]
EXACT["llava_mistral_instruct"] = EXACT["mistral_instruct"]
VISUAL = "Answer the questions about the visual content that the user provides."
FORMAT = (
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
for name, system in (("simple", VISUAL), ("mmtag", VISUAL + FORMAT)):
    begin = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\nQ [/INST]"
    EXACT[f"llava_llama_2_{name}"] = (begin, begin + " A </s><s>[INST] R [/INST]")
ORCA = (
    "You are MistralOrca, a large language model trained by Alignment Lab AI. Write out your "
    "reasoning step-by-step to be sure you get the right answers!"
)
EXACT["mistral_orca"] = tuple(text.replace(MPT, ORCA) for text in EXACT["mpt"])  # type: ignore[assignment]
ZEPHYR = "<|system|>\nYou are a helpful AI assistant.</s><|user|>\nQ</s><|assistant|>\n"
EXACT["mistral_zephyr"] = (ZEPHYR, ZEPHYR + "A</s><|user|>\nR</s><|assistant|>\n")
LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    f"{LANGUAGE_AND_VISION}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
EXACT["llava_llama_3"] = (
    LLAMA_3,
    LLAMA_3 + "A<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
for same in ("chatml_direct", "mistral_direct"):
    EXACT[same] = (
        f"{DIRECT}Q<|im_end|><|im_start|>assistant\n",
        f"{DIRECT}Q<|im_end|><|im_start|>assistant\nA<|im_end|><|im_start|>user\nR<|im_end|>"
        "<|im_start|>assistant\n",
    )
EXACT["qwen_2"] = EXACT["qwen_1_5"]
CLOUD = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
EXACT["qwen_2_5"] = tuple(text.replace(QWEN, CLOUD) for text in EXACT["qwen_1_5"])  # type: ignore[assignment]
# The example turns, whose text is in goldens/conversations.json.
ENERGY = "###Human: {}###Assistant: {}###Human: Q".format(*templates.find("v0").examples)
for same in ("default", "v0"):
    EXACT[same] = tuple(  # type: ignore[assignment]
        text.replace("###Human: Q", ENERGY) for text in EXACT["llava_v0"]
    )
STOPS = {
    "vicuna_v1": "</s>", "v1": "</s>", "llava_v1": "</s>", "v1_mmtag": "</s>", "llava_v0": "###",
    "v0_mmtag": "###", "mpt": "<|im_end|>", "chatml_direct": "<|im_end|>", "plain": "\n",
    "mistral_direct": "<|im_end|>", "qwen_1_5": "<|im_end|>", "qwen_2": "<|im_end|>",
    "mlcd_chat": "<|im_end|>", "llava_llama_3": "<|eot_id|>", "mistral_zephyr": "</s>",
    "mistral_orca": "<|im_end|>", "v0": "###", "default": "###", "qwen_2_5": "<|im_end|>",
}  # fmt: skip


def test_every_template_is_written_down_here() -> None:
    assert set(EXACT) == set(templates.TEMPLATES)


@pytest.mark.parametrize("name", EXACT)
def test_one_turn_and_several(name: str) -> None:
    template = templates.find(name)
    one, several = (
        template.render(turns).replace(templates.CUT, "") for turns in (["Q"], ["Q", "A", "R"])
    )
    assert (one, several) == EXACT[name]


@pytest.mark.parametrize("name", STOPS)
def test_what_ends_an_answer(name: str) -> None:
    assert templates.find(name).stop == STOPS[name]


def test_the_chat_script_cuts_where_it_joins_token_lists() -> None:
    shown = templates.find("mlcd_chat").render(["Q", "A", "R"]).split(templates.CUT)
    assert shown == [
        "<|im_start|>system", f"{QWEN}<|im_end|>", "\n", "<|im_start|>user", "\n", "Q<|im_end|>",
        "\n", "<|im_start|>assistant", "\n", "A<|im_end|>", "\n", "<|im_start|>user", "\n",
        "R<|im_end|>", "\n", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "turns", "expected"),
    [
        ("llama_2", ["s>s>Q"], "[INST] <<SYS>>"),
        ("mistral_instruct", ["  Q"], "[INST]   Q"),
        ("mistral_instruct", ["<s>"], "[INST] <s>"),
    ],
)
def test_only_the_separators_characters_in_front_are_stripped(
    name: str, turns: list[str], expected: str
) -> None:
    assert templates.find(name).render(turns).startswith(expected)


def test_turns_are_taken_as_they_are() -> None:
    odd = " <s>Q###\n{0} %s "
    for name in set(EXACT) - {"mlcd_chat", "llava_llama_3"}:
        shown = templates.find(name).render([odd])
        expected = odd.join(re.split(r"Q(?!wen)", EXACT[name][0]))
        assert shown == expected, name


def test_llama_3_removes_blanks_around_a_turn() -> None:
    shown = templates.find("llava_llama_3").render([" \nQ\n "])
    assert shown == EXACT["llava_llama_3"][0]


def test_an_unknown_template_names_its_neighbours() -> None:
    with pytest.raises(InputError, match="vicuna_v2") as refused:
        templates.find("vicuna_v2")
    assert "vicuna_v1" in refused.value.hint
    with pytest.raises(InputError, match="that of Gemma"):
        templates.find("gemma_instruct")
    with pytest.raises(InputError) as refused:
        templates.find("?")
    assert all(name in refused.value.hint for name in templates.TEMPLATES)
