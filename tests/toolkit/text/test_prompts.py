"""From turns to runs of token ids: slots of images, the BOS that is kept, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import tokenizers

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.text import prompts, templates
from edgevlm.toolkit.text.added_tokens import Declared
from edgevlm.toolkit.text.prompts import Prompt, PromptRules
from edgevlm.toolkit.text.sentencepiece_model import from_sentencepiece
from edgevlm.toolkit.text.sentencepiece_text import SentencePieceRules
from edgevlm.toolkit.text.tokenizer import Tokenizer, byte_tokenizer
from tests.conftest import HERE

MODEL = HERE / "goldens/e2e_llava15/llava-v1.5-tiny/tokenizer.model"
SPM = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
LLAVA = PromptRules("vicuna_v1", "pieces", (2,), sentencepiece=SentencePieceRules())
FACING = PromptRules("vicuna_v1", "token", (2,))
MLCD = PromptRules("qwen_1_5", "pieces", (2,))


def llama() -> Tokenizer:
    return Tokenizer.from_text(*from_sentencepiece(MODEL, {"legacy": False}, Declared({})))


def plain_bytes() -> Tokenizer:
    """No BOS; ids 0-255 are the bytes, then the image's token."""
    return Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer({"<image>": 256})))


def plain_bytes_of(text: str) -> list[int]:
    """The ids of `plain_bytes` if no token is special."""
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer({}))
    return list(inner.encode(text).ids)


def text_of(rules: PromptRules, turns: list[str], images: int, template: str = "auto") -> str:
    return prompts.render(rules, turns, images, template).text


# -- rendering -----------------------------------------------------------------------------


def test_images_come_first_unless_they_have_a_slot() -> None:
    system = templates.find("vicuna_v1").system
    assert text_of(LLAVA, ["Q"], 0) == f"{system} USER: Q ASSISTANT:"
    assert text_of(LLAVA, ["Q"], 1) == f"{system} USER: <image>\nQ ASSISTANT:"
    assert text_of(LLAVA, ["Q"], 2) == f"{system} USER: <image>\n<image>\nQ ASSISTANT:"
    assert text_of(LLAVA, ["a <image> b"], 1) == f"{system} USER: a <image> b ASSISTANT:"


def test_each_turn_may_have_images_of_its_own() -> None:
    """As the originals' chats write them: `<image>` and a newline before the turn's text."""
    system, turns = templates.find("vicuna_v1").system, ["Q", "A", "R"]
    found = prompts.render(LLAVA, turns, [1, 0, 2], "auto").text
    assert found == (
        f"{system} USER: <image>\nQ ASSISTANT: A</s>USER: <image>\n<image>\nR ASSISTANT:"
    )
    literal = prompts.render(LLAVA, ["Q <image>", "A", "R"], [0, 0, 1], "auto", llama())
    assert prompts.tokenize(LLAVA, llama(), literal).images == 1
    placed = prompts.render(LLAVA, ["Q <image>", "A", "R"], [0, 0, 1], "auto").text
    assert placed.count("<image>") == 1
    with pytest.raises(InputError, match="4 turns of a conversation of 3"):
        prompts.render(LLAVA, turns, [0, 0, 0, 1], "auto")


def test_images_of_a_conversation_belong_to_its_first_turn() -> None:
    system = templates.find("vicuna_v1").system
    found = text_of(LLAVA, ["Q", "A", "R"], 2)
    assert found == f"{system} USER: <image>\n<image>\nQ ASSISTANT: A</s>USER: R ASSISTANT:"
    later = text_of(LLAVA, ["Q", "A", "<image> R"], 1)
    assert later == f"{system} USER: Q ASSISTANT: A</s>USER: <image> R ASSISTANT:"


def test_the_models_own_text_for_an_image() -> None:
    wrapped = PromptRules("plain", "pieces", (2,), image_text="<im_start><image><im_end>")
    assert text_of(wrapped, ["Q"], 1) == "<im_start><image><im_end>\nQ\n"
    chat = prompts.render(MLCD, ["<image>Q"], 1, "mlcd_chat")
    assert chat.stretches[4:8] == ("\n", "<image>", "\n", "Q<|im_end|>")
    assert "<image>\nQ<|im_end|>" in chat.text
    assert (chat.stop, chat.tiles) == ("<|im_end|>", False)


def test_a_template_by_name_and_none() -> None:
    assert text_of(LLAVA, ["Q"], 0, "mistral_instruct") == "[INST] Q [/INST]"
    raw = prompts.render(LLAVA, [" <image> raw"], 1, "none")
    assert (raw.text, raw.stop, raw.tiles) == (" <image> raw", None, True)


@pytest.mark.parametrize(
    ("turns", "template", "reason"),
    [
        (["Q", "A", "R"], "none", "needs a template"),
        (["Q", "A"], "auto", "question"),
        ([], "auto", "question"),
        (["Q"], "vicuna_v9", "vicuna_v9"),
    ],
)
def test_mistakes_are_refused(turns: list[str], template: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prompts.render(LLAVA, turns, 0, template)


# -- tokenizing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Q",
        "a<image>\nb",
        "<image>\nQ",
        "<image><image>",
        "a<image> b <image>",
        "<image>",
        " <image> ",
    ],
)
def test_every_piece_is_tokenized_separately_and_the_first_keeps_its_bos(text: str) -> None:
    pieces = [SPM.encode(piece) for piece in text.split("<image>")]
    pieces[0].insert(0, 1)
    assert prompts.tokenize(LLAVA, llama(), text) == Prompt(tuple(map(tuple, pieces)))


def test_a_tokenizer_without_bos_loses_nothing() -> None:
    found = prompts.tokenize(MLCD, plain_bytes(), "ab<image>cd<image>")
    pieces = plain_bytes().encode("ab"), plain_bytes().encode("cd")
    assert found.runs == (*map(tuple, pieces), ())
    assert found.images == 2


def test_stretches_of_a_template_are_tokenized_separately_too() -> None:
    stretches = ("a", "b<image>c", "", "d")
    found = prompts.tokenize(LLAVA, llama(), prompts.Rendered(stretches))
    assert found.runs == (
        (1, *SPM.encode("a"), *SPM.encode("b")),
        (*SPM.encode("c"), *SPM.encode("d")),
    )


def test_a_token_for_images_cuts_one_text() -> None:
    tokenizer = plain_bytes()
    found = prompts.tokenize(FACING, tokenizer, "a<image>\nb<image>")
    assert found.runs == (
        tuple(tokenizer.encode("a")),
        tuple(tokenizer.encode("\nb")),
        (),
    )


# -- assembling ----------------------------------------------------------------------------


def test_rows_of_images_come_between_the_runs() -> None:
    prompt = Prompt(((1, 5), (6,), ()))
    found = prompts.assemble(prompt, [np.asarray([3, 2]), np.asarray([7])])
    assert found.ids.tolist() == [[1, 5, 0, 0, 6, 0]]
    assert found.rows.tolist() == [[-1, -1, 3, 2, -1, 7]]
    assert found.ids.dtype == found.rows.dtype == np.int64
    assert (found.length, found.image_tokens) == (6, 3)


def test_text_alone_and_nothing_at_all() -> None:
    assert prompts.assemble(Prompt(((4, 4),)), []).rows.tolist() == [[-1, -1]]
    assert prompts.assemble(Prompt(((),)), []).length == 0


@pytest.mark.parametrize("images", [0, 2])
def test_there_must_be_as_many_slots_as_images(images: int) -> None:
    with pytest.raises(InputError, match=rf"1 image slot.* {images} image"):
        prompts.check_slots(Prompt(((1,), (2,))), images)
    with pytest.raises(InputError):
        prompts.assemble(Prompt(((1,), (2,))), [np.asarray([0])] * images)


# -- what a user typed ---------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [LLAVA, FACING, MLCD], ids=["llava", "token", "mlcd"])
@pytest.mark.parametrize("template", ["auto", "mlcd_chat", "llama_2"])
def test_no_character_of_a_users_text_is_a_mark(rules: PromptRules, template: str) -> None:
    tokenizer = plain_bytes()
    typed = "".join(map(chr, range(32))) + "\x7f\u2028\U000f0000\U000f0001"
    ids = tokenizer.encode(typed)
    for literal in (None, tokenizer):
        rendered = prompts.render(rules, [typed], 0, template, literal)
        (run,) = prompts.tokenize(rules, tokenizer, rendered).runs
        assert typed in rendered.text
        assert any(list(run[i : i + len(ids)]) == ids for i in range(len(run)))


def test_older_tokenizers_take_literal_text_too() -> None:
    """`legacy` puts a blank before every stretch between special tokens; here there is one."""
    tokenizer = Tokenizer.from_text(*from_sentencepiece(MODEL, {"legacy": True}, Declared({})))
    literal = prompts.render(LLAVA, ["Say </s> <s>now"], 0, "auto", tokenizer)
    (run,) = prompts.tokenize(LLAVA, tokenizer, literal).runs
    assert list(run) == [1, *SPM.encode(literal.text)]
    plain = prompts.render(LLAVA, ["Say"], 0, "auto")
    found = tokenizer.encode(plain.text)
    assert list(prompts.tokenize(LLAVA, tokenizer, plain).runs[0]) == found


def test_notes_name_control_tokens() -> None:
    tokenizer, chat = plain_bytes(), replace(FACING, chat_template="{{ '<|x|>' }}")
    tokenizer._inner.add_tokens(["<|x|>", "  "])
    tokenizer._inner.add_special_tokens(["<|end|>"])
    typed = ["a<|end|>  <image>", "b", "<|x|>"]
    tail = "; --literal reads them as text"
    found = prompts.notes_on(chat, typed, "auto", tokenizer)
    assert found == (f"control tokens in the prompt's text: <|end|>, <|x|>{tail}",)
    assert prompts.notes_on(chat, typed, "plain", tokenizer) == (
        f"control tokens in the prompt's text: <|end|>{tail}",
    )
    assert prompts.notes_on(chat, ["<image> a  b"], "auto", tokenizer) == ()
    assert prompts.notes_on(chat, typed[:1], "none", tokenizer) == ()


def test_control_tokens_that_a_user_typed_have_their_meaning_unless_literal() -> None:
    """`</s>` in a turn is a token, and as literal text what sentencepiece makes of it."""
    tokenizer = llama()
    plain = prompts.render(LLAVA, ["Say </s> now"], 0, "auto")
    assert list(prompts.tokenize(LLAVA, tokenizer, plain).runs[0]).count(2) == 1
    literal = prompts.render(LLAVA, ["Say </s> now"], 0, "auto", tokenizer)
    assert literal.text == plain.text
    (run,) = prompts.tokenize(LLAVA, tokenizer, literal).runs
    # sentencepiece itself has no control tokens in texts, and this prompt has none of its own
    assert list(run) == [1, *SPM.encode(plain.text)]
    assert 2 not in run


def test_the_templates_own_tokens_stay_tokens() -> None:
    tokenizer = llama()
    turns = ["a</s>", "b<s>", "c<unk></s></s>"]
    literal = prompts.render(LLAVA, turns, 0, "auto", tokenizer)
    (run,) = prompts.tokenize(LLAVA, tokenizer, literal).runs
    system = templates.find("vicuna_v1").system
    first = f"{system} USER: a</s> ASSISTANT: b<s>"
    second = "USER: c<unk></s></s> ASSISTANT:"
    # After a special token, the tokenizer of `legacy: false` begins without a blank.
    later = SPM.encode("\n" + second)[len(SPM.encode("\n")) :]
    assert list(run) == [1, *SPM.encode(first), 2, *later]


def test_text_without_control_tokens_is_the_same_in_both_ways() -> None:
    for turns in (["What?"], [" a < s > b ", "</ s>", "\u2581x"]):
        ways = [prompts.render(LLAVA, turns, 1, "auto", way) for way in (None, llama())]
        assert ways[0] == ways[1]


def test_literal_placeholders_are_no_slots() -> None:
    for rules, tokenizer in ((LLAVA, llama()), (FACING, plain_bytes())):
        literal = prompts.render(rules, ["What is <image>?"], 1, "auto", tokenizer)
        assert "USER: <image>\nWhat is <image>? ASSISTANT:" in literal.text
        found = prompts.tokenize(rules, tokenizer, literal)
        assert found.images == 1
        after = "\nWhat is <image>? ASSISTANT:"
        as_text = SPM.encode(after) if rules is LLAVA else plain_bytes_of(after)
        assert list(found.runs[1]) == as_text


def test_tokens_hidden_in_one_another_and_in_marks() -> None:
    """Overlapping tokens, and a user who knows the marks, gain nothing."""
    tokenizer = llama()
    for typed in ("<<s></s>s>", "\U000f0000</s>\U000f0000", "<\U000f0000/s>", "<s" + "<s>" * 3):
        literal = prompts.render(LLAVA, [typed], 0, "auto", tokenizer)
        (run,) = prompts.tokenize(LLAVA, tokenizer, literal).runs
        assert list(run) == [1, *SPM.encode(literal.text)]
        assert typed in literal.text


def test_a_raw_prompt_is_no_users_text() -> None:
    with pytest.raises(InputError, match="--literal"):
        prompts.render(LLAVA, ["Q"], 0, "none", llama())


def test_the_llama_3_template_brings_its_own_bos() -> None:
    special = {"<|begin_of_text|>": 256, "<|eot_id|>": 257, "<|start_header_id|>": 258,
               "<|end_header_id|>": 259}  # fmt: skip
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer(special))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 256)]
    )
    rendered = prompts.render(LLAVA, ["Q"], 1, "llava_llama_3")
    found = prompts.tokenize(LLAVA, Tokenizer(inner), rendered)
    assert found.runs[0][:2] == (256, 258)
    assert [number for run in found.runs for number in run].count(256) == 1
    # The original tokenizes the text with its BOS, and the tokenizer adds a second one.
    # https://github.com/LLaVA-VL/LLaVA-NeXT/issues/78 shows the text.
    raw = prompts.render(LLAVA, [rendered.text], 1, "none")
    assert prompts.tokenize(LLAVA, Tokenizer(inner), raw).runs[0] == (256, *found.runs[0])
    assert found.runs[1][-1] == inner.encode("\n", add_special_tokens=False).ids[0]


def test_an_image_token_of_another_name_is_written_as_image() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer({"<|image|>": 256})))
    rules = PromptRules("vicuna_v1", "token", (2,), image_text="<|image|>")
    expected = (tuple(tokenizer.encode("a")), tuple(tokenizer.encode("\nb")), ())
    assert prompts.tokenize(rules, tokenizer, "a<image>\nb<image>").runs == expected
    assert prompts.tokenize(rules, tokenizer, "a<|image|>\nb<image>").runs == expected
    shown = text_of(rules, ["Q"], 1)
    assert "<|image|>\nQ" in shown
    assert "<image>" not in shown
    assert prompts.tokenize(rules, tokenizer, shown).images == 1


def test_a_token_without_a_row_is_refused_by_name() -> None:
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer({"<image>": 256, "<late>": 257}))
    tokenizer = Tokenizer(inner, rows=257)
    for rules in (FACING, MLCD):
        assert prompts.tokenize(rules, tokenizer, "a<image>b").images == 1
        with pytest.raises(InputError, match="'<late>'.*id 257 of 257 rows"):
            prompts.tokenize(rules, tokenizer, "a<image>b<late>")


def test_a_conversation_that_has_ended_asks_for_nothing() -> None:
    turns = ["Q", "A"]
    ended = prompts.render(LLAVA, turns, 0, "vicuna_v1", ended=True).text
    asking = prompts.render(LLAVA, [*turns, "R"], 0, "vicuna_v1").text
    assert ended.endswith("USER: Q ASSISTANT: A</s>")
    assert asking == f"{ended}USER: R ASSISTANT:"
    assert prompts.render(LLAVA, turns, 0, "qwen_1_5", ended=True).text.endswith("A<|im_end|>\n")
    with pytest.raises(InputError, match="has 1 turns; it must end with the answer"):
        prompts.render(LLAVA, ["Q"], 0, "vicuna_v1", ended=True)
    with pytest.raises(InputError, match="must end with the user's question"):
        prompts.render(LLAVA, turns, 0, "vicuna_v1")
