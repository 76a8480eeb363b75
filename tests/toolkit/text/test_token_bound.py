"""Texts that cannot fit are refused before they are tokenized, and no other text is."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import PromptRules
from edgevlm.toolkit.text.tokenizer import Tokenizer, byte_tokenizer

GOLDENS = Path(__file__).parents[2] / "goldens"
FILES = {
    "Vicuna": GOLDENS / "e2e_llava15/llava-v1.5-tiny/tokenizer.json",
    "Qwen2, with NFC": GOLDENS / "mlcd_llavanext_e2e/tokenizer.json",
}
TOKENIZERS = {name: Tokenizer.open(path) for name, path in FILES.items()}
TOKENIZERS["bytes"] = Tokenizer.from_text(byte_tokenizer({"<|im_start|>": 256, "</s>": 257}))
# Characters that normalizers compose, and blanks that added tokens may take.
PARTS = ["a", "\u03b1\u0313\u0300\u0345", "e\u0301", "\u1100\u1161\u11a8", "</s>", "   ",
         "<|im_start|>", "\n\n", "the ", "\U0001f600", "\u200b", "<image>", "hello",
         "1234", "\t"]  # fmt: skip


def changed(name: str, **changes: Any) -> Tokenizer:
    data = json.loads(FILES[name].read_text())
    model = {**data["model"], **changes.pop("model", {})}
    return Tokenizer.from_text(json.dumps({**data, **changes, "model": model}))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=9), max_size=60))
@example(["\u03b1\u0313\u0300\u0345"] * 99)
@example(["</s>", "  " * 99] * 9)
def test_the_bound_is_never_above_the_number_of_tokens(name: str, parts: list[str]) -> None:
    tokenizer, text = TOKENIZERS[name], "".join(parts)
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, special=False))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bound_of_a_long_text(name: str) -> None:
    """A share of the letters: the longest token of these vocabularies has some dozen."""
    assert TOKENIZERS[name].fewest_tokens("hello world " * 10_000) > 1000


def test_no_character_is_composed_of_more_than_four() -> None:
    parts = (unicodedata.normalize("NFD", chr(number)) for number in range(0x110000))
    assert max(map(len, parts)) == 4


UNKNOWN: dict[str, dict[str, Any]] = {
    "a normalizer that strips": {"normalizer": {"type": "Strip", "strip_left": True,
                                                "strip_right": True}},
    "one that replaces by a pattern": {"normalizer": {"type": "Replace", "content": "",
                                                      "pattern": {"Regex": "a+"}}},
    "unknown characters as one token": {"model": {"byte_fallback": False}},
    "a cut that removes": {"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"},
                                             "behavior": "Removed", "invert": False}},
}  # fmt: skip


@pytest.mark.parametrize("way", UNKNOWN)
def test_where_characters_may_vanish_nothing_is_refused(way: str) -> None:
    assert changed("Vicuna").fewest_tokens("a" * 10_000) > 0
    assert changed("Vicuna", **UNKNOWN[way]).fewest_tokens("a" * 10_000) == 0


def test_a_prompt_beyond_the_context_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["Vicuna"]
    rules = PromptRules("vicuna_v1", "pieces", (2,))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the text was tokenized")

    monkeypatch.setattr(Tokenizer, "encode", never)
    rendered = prompts.render(rules, ["hello " * 100_000], 0, "auto")
    with pytest.raises(InputError, match=r"characters are at least \d+ tokens, .* is 2048"):
        prompts.check_text_length(rules, tokenizer, rendered, 2048)
    # What fits is let through, and so is what might: placeholders of images, a prompt to be cut.
    for turn in ("hello " * 3000, "<image>" * 100_000, " " * 600_000):
        rendered = prompts.render(rules, [turn], 0, "auto")
        prompts.check_text_length(rules, tokenizer, rendered, 2048)
    cut = PromptRules("vicuna_v1", "pieces", (2,), cut=99)
    rendered = prompts.render(cut, ["hello " * 100_000], 0, "auto")
    prompts.check_text_length(cut, tokenizer, rendered, 2048)
