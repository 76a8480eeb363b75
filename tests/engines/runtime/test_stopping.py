"""Stop strings: the answer ends before the first, however the text is cut into tokens."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgevlm.engines.runtime.stopping import StoppingText
from edgevlm.toolkit.text.tokenizer import Tokenizer, byte_tokenizer

BYTES = Tokenizer(tokenizers.Tokenizer.from_str(byte_tokenizer({"</s>": 256})))
LETTERS = st.text("ab#\n", max_size=24)
STOPS = st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=3)


class Words:
    """A tokenizer whose ids are given pieces of text: any cut of a text can be tried."""

    def __init__(self, pieces: list[str], special: tuple[str, ...] = ()) -> None:
        self._pieces = pieces
        self.special_tokens = {i: p for i, p in enumerate(pieces) if p in special}

    def decode(self, ids: list[int]) -> str:
        return "".join(self._pieces[i] for i in ids if i not in self.special_tokens)


def cut(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({at % (len(text) + 1) for at in cuts} | {0, len(text)})
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def released_by(
    pieces: list[str], stops: list[str], special: tuple[str, ...] = ()
) -> tuple[list[str], StoppingText]:
    """What each token releases, and what finishing does; ends where the answer ends."""
    tokenizer: object = Words(pieces, special)
    assert hasattr(tokenizer, "decode")
    stopping = StoppingText(tokenizer, stops)  # type: ignore[arg-type]
    released = []
    for token in range(len(pieces)):
        released.append(stopping.push(token))
        if stopping.stopped:
            break
    return [*released, stopping.finish()], stopping


def before_the_first(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(deadline=None, max_examples=500, derandomize=True)
@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=12))
@example("a##b###a", ["###"], [])
@example("a##b###a", ["###"], [1, 2, 3, 4, 5, 6, 7])
@example("abab#", ["ab#"], [1, 3])
@example("aba#", ["ba#", "a#"], [2])
def test_the_answer_ends_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    expected, stopped = before_the_first(text, stops)
    released, stopping = released_by(cut(text, cuts), stops)
    assert "".join(released) == expected
    assert (stopping.text, stopping.stopped) == (expected, stopped)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(LETTERS, STOPS)
def test_nothing_is_held_that_cannot_become_a_stop(text: str, stops: list[str]) -> None:
    released, _ = released_by(list(text), stops)
    for number in range(len(released) - 1):
        seen = text[: number + 1]
        held = seen[len("".join(released[: number + 1])) :]
        if before_the_first(seen, stops)[1]:
            break
        assert held == "" or any(s.startswith(held) for s in stops)


def test_a_template_adds_its_stop() -> None:
    stopping = StoppingText(BYTES, [])
    stopping.add_stop("###")
    ids = BYTES.encode("yes###Human")
    assert "".join(stopping.push(token) for token in ids) == "yes"
    assert stopping.stopped
    assert stopping.push(ids[0]) == ""
    assert stopping.finish() == ""


def test_an_empty_stop_string_stops_nothing() -> None:
    released, stopping = released_by(["a", "b"], [""])
    assert ("".join(released), stopping.stopped) == ("ab", False)
    stopping = StoppingText(BYTES, [])
    stopping.add_stop("")
    assert "".join(stopping.push(token) for token in BYTES.encode("ab")) == "ab"


WITH_SPECIAL = ["yes", "<|end|>", "no", "<|end|>", "\n", "<|pad|>", "x"]


@pytest.mark.parametrize(
    ("stops", "text", "stopped"),
    [
        ([], "yesno\nx", False),
        (["<|end|>"], "yes", True),
        (["<|end|>\n"], "yesno", True),
        (["<|end|>no"], "yes", True),
        (["no<|end|>"], "yes", True),
        (["s<|end|>"], "ye", True),
        (["x", "<|pad|>"], "yesno\n", True),
        (["<|end|><|end|>"], "yesno\nx", False),
        (["<|end|>no\n"], "yesno\nx", False),
        (["<|other|>"], "yesno\nx", False),
        (["<|pad|>x and more"], "yesno\nx", False),
    ],
)
def test_a_special_token_inside_a_stop_string_is_matched_by_its_id(
    stops: list[str], text: str, stopped: bool
) -> None:
    """The token of that name ends the answer, and no special token is part of the text."""
    released, stopping = released_by(WITH_SPECIAL, stops, ("<|end|>", "<|pad|>"))
    assert ("".join(released), stopping.text, stopping.stopped) == (text, text, stopped)


def test_characters_of_several_tokens_and_stops_of_several_bytes() -> None:
    stopping = StoppingText(BYTES, ["终"])
    released = [stopping.push(token) for token in BYTES.encode("é🙂终x")]
    assert released == ["", "é", "", "", "", "🙂", "", "", "", ""]
    assert (stopping.text, stopping.stopped) == ("é🙂", True)


def test_what_is_held_at_the_end_is_released() -> None:
    stopping = StoppingText(BYTES, ["###"])
    assert [stopping.push(token) for token in BYTES.encode("a##")] == ["a", "", ""]
    assert stopping.finish() == "##"
    assert stopping.finish() == ""
    assert stopping.text == "a##"
