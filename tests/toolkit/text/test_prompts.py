"""From turns to runs of token ids: slots of images, the BOS that is kept, what is refused."""

from __future__ import annotations

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


def text_of(rules: PromptRules, turns: list[str], images: int, template: str = "auto") -> str:
    return prompts.render(rules, turns, images, template).text


# -- rendering -----------------------------------------------------------------------------


def test_images_come_first_unless_they_have_a_slot() -> None:
    system = templates.find("vicuna_v1").system
    assert text_of(LLAVA, ["Q"], 0) == f"{system} USER: Q ASSISTANT:"
    assert text_of(LLAVA, ["Q"], 1) == f"{system} USER: <image>\nQ ASSISTANT:"
    assert text_of(LLAVA, ["Q"], 2) == f"{system} USER: <image>\n<image>\nQ ASSISTANT:"
    assert text_of(LLAVA, ["a <image> b"], 1) == f"{system} USER: a <image> b ASSISTANT:"


def test_images_of_a_conversation_belong_to_its_first_turn() -> None:
    system = templates.find("vicuna_v1").system
    found = text_of(LLAVA, ["Q", "A", "R"], 2)
    assert found == f"{system} USER: <image>\n<image>\nQ ASSISTANT: A</s>USER: R ASSISTANT:"
    later = text_of(LLAVA, ["Q", "A", "<image> R"], 1)
    assert later == f"{system} USER: Q ASSISTANT: A</s>USER: <image> R ASSISTANT:"


def test_the_models_own_text_for_an_image() -> None:
    wrapped = PromptRules("plain", "pieces", (2,), image_text="<im_start><image><im_end>")
    assert text_of(wrapped, ["Q"], 1) == "<im_start><image><im_end>\nQ\n"
    cut = templates.CUT
    chat = prompts.render(MLCD, ["<image>Q"], 1, "mlcd_chat")
    assert f"<image>{cut}\n{cut}Q" in chat.text
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


def test_pieces_between_cuts_are_tokenized_separately_too() -> None:
    cut = templates.CUT
    found = prompts.tokenize(LLAVA, llama(), f"a{cut}b<image>c{cut}{cut}d")
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
