"""Label masks: exactly those of the originals, and by their definition where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import transformers

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.text import templates
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.text.sentencepiece_text import SentencePieceRules
from edgevlm.toolkit.text.tokenizer import Tokenizer, byte_tokenizer
from edgevlm.training.data import masking
from edgevlm.training.data.broken import MISMATCH, UNKNOWN_TOKEN, BrokenSample
from edgevlm.training.data.masking import IGNORED, Labelled, TextRules
from edgevlm.training.data.prepare import rules_for
from tests.systems.chat_templates import CHAT
from tests.training.data.models import LLAVA, MLCD, flat, golden

CHATML = {"<|im_start|>": 256, "<|im_end|>": 257, "<image>": 258}
TURNS = ["<image>\nWhat is it?", "A cat.", "And now?\nSay it.", "A dog\nand a cat."]


def texts(conversation: list[dict[str, str]]) -> list[str]:
    return [turn["value"] for turn in conversation]


def byte_rules(template: str = "qwen_1_5", **changes: Any) -> tuple[TextRules, Tokenizer]:
    prompts = PromptRules(template, "pieces", (257,), **changes)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer(CHATML)))
    return TextRules(prompts), tokenizer


def said(tokenizer: Tokenizer, labelled: Labelled) -> str:
    """The targets as text, "|" where one or more tokens are none."""
    pieces = [""]
    for run in labelled.labels:
        for number in [*run, IGNORED]:
            if number == IGNORED:
                pieces.append("")
            else:
                pieces[-1] += tokenizer._inner.decode([number], skip_special_tokens=False)
    return "|".join(piece for piece in pieces if piece)


@pytest.mark.parametrize("name", LLAVA)
def test_the_masks_of_vicuna_are_the_originals(name: str) -> None:
    case = golden(name)
    rules = rules_for(case.model).text
    for number, conversation in enumerate(case.case["train_conversations"]):
        found = masking.encode(name, texts(conversation), rules, case.tokenizer)
        ids = case.inputs["train_input_ids"][number]
        real = case.inputs["train_attention_mask"][number]
        assert flat(found.runs, -200) == ids[real].tolist()
        labels = case.inputs["train_labels"][number]
        assert flat(found.labels, IGNORED) == labels[real].tolist()
        assert (labels[~real] == IGNORED).all()


@pytest.mark.parametrize("name", LLAVA)
def test_the_mask_of_a_caption_is_the_originals(name: str) -> None:
    case = golden(name)
    rules = rules_for(case.model, "plain").text
    found = masking.encode(name, texts(case.case["plain_conversation"]), rules, case.tokenizer)
    assert flat(found.runs, -200) == case.inputs["plain_input_ids"][0].tolist()
    assert flat(found.labels, IGNORED) == case.inputs["plain_labels"][0].tolist()


def test_the_masks_of_the_mlcd_golden_are_those_of_answers() -> None:
    # Its batch was made by hand: targets are the answer alone, the second one is cut off.
    case = golden(MLCD)
    rules = rules_for(case.model, original=False).text
    questions = ["What is shown in this picture? Describe the colors.",
                 "\nCompare the first picture and the second picture."]  # fmt: skip
    for number, question in enumerate(questions):
        turns = [f"<image>\n{question}", "A cat and a dog."]
        found = masking.encode("golden", turns, rules, case.tokenizer)
        real = case.inputs["train.attention_mask"][number]
        count = int(real.sum())
        ids, labels = (case.inputs[f"train.{key}"][number][real] for key in ("input_ids", "labels"))
        assert flat(found.runs, -200)[:count] == ids.tolist()
        assert flat(found.labels, IGNORED)[:count] == labels.tolist()
        assert number or count == len(flat(found.runs, -200))


def test_qwens_mask_keeps_headers_line_feeds_and_control_tokens() -> None:
    rules, tokenizer = byte_rules()
    found = masking.encode("x", TURNS, replace(rules, move="inside"), tokenizer)
    assert said(tokenizer, found) == (
        "<|im_start|>|\n|<|im_end|>\n<|im_start|>|\n|\n|<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>|\n|\n|<|im_end|>\n<|im_start|>assistant\nA dog\nand a cat.<|im_end|>\n"
    )
    answers = masking.encode("x", TURNS, replace(rules, original=False), tokenizer)
    assert answers.runs == found.runs
    assert said(tokenizer, answers) == "A cat.<|im_end|>\n|A dog\nand a cat.<|im_end|>\n"


def test_the_mask_of_mpts_chatml() -> None:
    rules, tokenizer = byte_rules("mpt")
    found = masking.encode("x", TURNS, rules, tokenizer)
    assert said(tokenizer, found) == "A cat.<|im_end|>|A dog\nand a cat.<|im_end|>"


def test_the_only_image_goes_to_the_front_as_each_trainer_does_it() -> None:
    rules, tokenizer = byte_rules()

    def shown(turn: str, **changes: Any) -> list[int]:
        labelled = masking.encode("x", [turn, "A"], replace(rules, **changes), tokenizer)
        return flat(labelled.runs, -200)

    front = shown("<image>\nQ")
    assert shown("Q <image>", move="always") == shown(" Q\n<image>", move="inside") == front
    assert shown("<image>Q ", move="always") == front != shown("<image>Q ", move="inside")
    two = shown("a <image> b <image>")
    assert two.count(-200) == 2
    at = two.index(-200)
    assert two[at + 1 :].index(-200) == len(" b ")


@pytest.mark.parametrize("splice", ["pieces", "token"])
def test_an_image_is_wrapped_as_the_rules_say(splice: Any) -> None:
    special = {"<|im_start|>": 256, "<|im_end|>": 257, "<img>": 258}
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer(special)))
    text = {"pieces": "<b><image><e>", "token": "<img>"}[splice]
    rules = TextRules(PromptRules("qwen_1_5", splice, (257,), image_text=text))
    for original in (True, False):
        chosen = replace(rules, original=original)
        first, second = masking.encode("x", ["<image>\nQ", "A"], chosen, tokenizer).runs
        shown = tokenizer.decode(first)[-3:], tokenizer.decode(second)[:4]
        assert shown == (("<b>", "<e>\n") if splice == "pieces" else ("er\n", "\nQ\nas"[:4]))


def test_mmtag_templates_mark_the_image() -> None:
    rules, tokenizer = byte_rules("llava_v1_mmtag")
    first, second = masking.encode("x", ["Q <image>", "A"], rules, tokenizer).runs
    assert tokenizer.decode(first).endswith("USER: <Image>")
    assert tokenizer.decode(second).startswith("</Image>\nQ ASSISTANT: A</s>")


# -- by rounds -------------------------------------------------------------------------------------


def llama(template: str, *, legacy: bool = False, one_less: bool | None = None) -> Any:
    case = golden("e2e_llava15")
    steps = SentencePieceRules(legacy=legacy)
    tokenizer = Tokenizer.open(case.folder / case.case["checkpoint"] / "tokenizer.json", steps)
    prompts = replace(case.model.prompts, sentencepiece=steps)
    less = not legacy if one_less is None else one_less
    return TextRules(prompts, template, one_less=less), tokenizer


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2", "llama_2", "mistral_instruct"])
def test_rounds_and_answers_agree_where_both_work(template: str, legacy: bool) -> None:
    rules, tokenizer = llama(template, legacy=legacy)
    found = masking.encode("x", TURNS, rules, tokenizer)
    answers = masking.encode("x", TURNS, replace(rules, original=False), tokenizer)
    assert found == answers
    assert said(tokenizer, found).endswith("</s>")


def test_the_rule_of_one_less_breaks_the_other_kind_of_tokenizer() -> None:
    # ConvLLaVA always takes one; with a legacy tokenizer its trainer drops every longer dialogue.
    for legacy in (False, True):
        rules, tokenizer = llama("vicuna_v1", legacy=legacy, one_less=legacy)
        masking.encode("x", TURNS[:2], rules, tokenizer)
        with pytest.raises(BrokenSample) as caught:
            masking.encode("x", TURNS, rules, tokenizer)
        assert caught.value.kind == MISMATCH


@pytest.mark.parametrize("typed", ["a</s>b", "say ASSISTANT: it"])
def test_text_that_looks_like_the_template_is_a_mismatch(typed: str) -> None:
    rules, tokenizer = llama("vicuna_v1")
    with pytest.raises(BrokenSample, match="rounds have"):
        masking.encode("x", ["Q", typed], rules, tokenizer)


# -- every template --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(templates.TEMPLATES))
def test_every_template_learns_the_answers_and_their_end(name: str) -> None:
    rules, tokenizer = llama(name)
    turns = TURNS[:2] if templates.find(name).style == "plain" else TURNS
    found = masking.encode("x", turns, rules, tokenizer)
    spoken = said(tokenizer, found)
    assert "What" not in spoken
    squeezed = "".join(spoken.split())
    for answer in turns[1::2]:
        assert "".join(answer.split()) in squeezed
    assert masking.check_template(rules, tokenizer) == ()


def special_tokens() -> dict[str, int]:
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<|begin_of_text|>",
             "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip
    return {name: 256 + number for number, name in enumerate(names)}


def chat_rules(source: str) -> tuple[TextRules, Tokenizer]:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer(special_tokens())))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    prompts = PromptRules("vicuna_v1", "token", (257, 259, 264), chat_template=source,
                          special_tokens=named)  # fmt: skip
    return TextRules(prompts), tokenizer


MARKED = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 2": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
        "{{ m['content'] }} [/INST]{% else %}{% generation %} {{ m['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_chat_templates_with_marks_give_transformers_masks(name: str) -> None:
    rules, tokenizer = chat_rules(MARKED[name])
    found = masking.encode("x", TURNS, rules, tokenizer)
    fast: Any = transformers.PreTrainedTokenizerFast
    theirs = fast(tokenizer_object=tokenizer._inner, bos_token="<s>", eos_token="</s>")
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(TURNS)]
    expected = theirs.apply_chat_template(
        messages, chat_template=MARKED[name], return_dict=True, return_assistant_tokens_mask=True
    )
    assert flat(found.runs, 260) == expected["input_ids"]
    mask = [int(label != IGNORED) for label in flat(found.labels, IGNORED)]
    assert mask == expected["assistant_masks"]


# Chat templates whose answers are not what they ask for: a blank more, or a prompt in any case.
ODD = {"OneVision's", "loops that break, JSON, a namespace"}
SHORT = "lists in questions, texts in answers"  # it asks for an answer after one, too


@pytest.mark.parametrize("name", sorted(CHAT.keys() - ODD - {SHORT}))
def test_published_chat_templates_learn_the_answers(name: str) -> None:
    rules, tokenizer = chat_rules(CHAT[name][0])
    found = masking.encode("x", TURNS, rules, tokenizer)
    spoken = said(tokenizer, found)
    assert "What" not in spoken and "now" not in spoken
    assert "A cat." in spoken
    assert "A dog\nand a cat." in spoken.replace("\\n", "\n")


@pytest.mark.parametrize("name", sorted(ODD))
def test_a_chat_template_that_cannot_be_trained_with_is_refused(name: str) -> None:
    rules, tokenizer = chat_rules(CHAT[name][0])
    with pytest.raises(ConfigError, match="does not begin the whole conversation") as caught:
        masking.check_template(rules, tokenizer)
    assert "--template" in caught.value.hint


def test_what_a_template_cannot_teach_is_noted() -> None:
    (note,) = masking.check_template(*chat_rules(CHAT["llava-hf, vicuna"][0]))
    assert "stop" in note
    assert masking.check_template(*chat_rules(MARKED["chatml"])) == ()


def test_a_template_that_changes_earlier_turns_is_a_mismatch() -> None:
    forgets = (
        "{% for m in messages %}{{ m['role'] }}: {% if loop.last or m['role'] == 'user' %}"
        "{{ m['content'] }}{% else %}{{ m['content'] | lower }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rules, tokenizer = chat_rules(forgets)
    masking.encode("x", ["Q", "A"], rules, tokenizer)
    with pytest.raises(BrokenSample, match="up to the end of answer 1"):
        masking.encode("x", ["Q", "A", "Q", "A"], rules, tokenizer)
    for odd in (forgets, CHAT[SHORT][0]):
        notes = masking.check_template(*chat_rules(odd))
        assert "more than one round" in notes[0]


def test_a_token_without_a_row_breaks_the_sample() -> None:
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer({**CHATML, "<late>": 300}))
    rules = TextRules(PromptRules("qwen_1_5", "pieces", (257,)))
    with pytest.raises(BrokenSample) as caught:
        masking.encode("x", ["Q <late>", "A"], rules, Tokenizer(inner, rows=259))
    assert caught.value.kind == UNKNOWN_TOKEN
