"""Ids against the sentencepiece package, and text that streams without breaking characters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.text.added_tokens import AddedToken, Declared
from edgevlm.toolkit.text.sentencepiece_model import from_sentencepiece
from edgevlm.toolkit.text.tokenizer import (
    TextStream,
    Tokenizer,
    byte_tokenizer,
    token_of,
)
from tests.conftest import HERE

LLAMA = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"
BYTES = HERE / "goldens/mlcd_llavanext_e2e/tokenizer.json"
SPM = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))
MODEL, NOTHING = LLAMA / "tokenizer.model", Declared({})
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
BLANK = "\u2581"

TEXTS = [
    "", " ", "  ", "a", " a", "  a", "a ", "a  ", "Hello, world!", "Hello  world\n", "\n", "\nWhat",
    "\n\n What", "\t", "naïve café", "你好，世界", "Привет", "🙂", "a🙂b", "🙂 🙂",
    "👩‍👩‍👧", "\u00a0x",
    "x\u200by", "1234567890", "USER: What is in the image? ASSISTANT:", f"{BLANK}a", f"a{BLANK}b",
    "e\u0301", "\x00", "ﬁ", "<image>", "</ s>", "<s", "'\"`{}[]()<>|\\",
]  # fmt: skip
AROUND = [
    "</s>", "a</s>", "</s>a", "a</s>b", "a </s> b", "</s></s>a", "<s>a</s>b<s> c", " </s>", "</s> ",
    "a</s>USER: b ASSISTANT: c</s>USER:", "</s>\nb", "a</s>  b", "x<unk>y", "</s>你好",
    f"</s>{BLANK}a",
]  # fmt: skip
ANY_TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n.,:abcdeUSR'1"), st.characters(exclude_categories=["Cs"]), st.just("🙂")
    ),
    max_size=30,
)


def ours(legacy: Any) -> Tokenizer:
    return Tokenizer.from_text(*from_sentencepiece(MODEL, {"legacy": legacy}, NOTHING))


TOKENIZERS = {legacy: ours(legacy) for legacy in (True, False)}


def pieces(text: str) -> list[str]:
    """The text cut before and after special tokens."""
    found, rest = [""], text
    while rest:
        name = next((s for s in SPECIAL if rest.startswith(s)), None)
        if name:
            found += [name, ""]
            rest = rest[len(name) :]
        else:
            found[-1] += rest[0]
            rest = rest[1:]
    return [piece for piece in found if piece]


def slow_ids(text: str, *, legacy: bool) -> list[int]:
    """The slow Llama tokenizer: sentencepiece on every stretch between special tokens.

    legacy: each stretch gets sentencepiece's blank in front. Otherwise the whole text gets one,
    and stretches after a special token are encoded as if they went on.
    """
    ids = [1]
    for number, piece in enumerate(pieces(text)):
        if piece in SPECIAL:
            ids.append(SPECIAL[piece])
        elif legacy or number == 0:
            ids += SPM.encode(piece)
        else:
            ids += SPM.encode("\n" + piece)[2:]  # after the blank and the newline's byte
    return ids


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece(text: str, legacy: bool) -> None:
    tokenizer = TOKENIZERS[legacy]
    assert tokenizer.encode(text, special=False) == SPM.encode(text)
    assert tokenizer.encode(text) == [1, *SPM.encode(text)]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", AROUND)
def test_ids_around_special_tokens(text: str, legacy: bool) -> None:
    assert TOKENIZERS[legacy].encode(text) == slow_ids(text, legacy=legacy)


@pytest.mark.parametrize("legacy", [True, False])
@settings(deadline=None, max_examples=300, derandomize=True)
@given(stretches=st.lists(st.one_of(ANY_TEXT, st.sampled_from(["</s>", "<s>"])), max_size=4))
def test_ids_of_any_text(stretches: list[str], legacy: bool) -> None:
    text = "".join(stretches)
    assert TOKENIZERS[legacy].encode(text) == slow_ids(text, legacy=legacy)


def test_legacy_matters_after_a_special_token() -> None:
    old, new = (TOKENIZERS[legacy].encode("a</s>USER") for legacy in (True, False))
    assert old != new
    assert TOKENIZERS[True].encode("USER") == TOKENIZERS[False].encode("USER")


@pytest.mark.parametrize(("given", "means"), [(None, True), (True, True), (False, False)])
def test_legacy_is_the_default(given: bool | None, means: bool) -> None:
    assert ours(given).encode("a</s>USER") == TOKENIZERS[means].encode("a</s>USER")


def test_bos_may_be_left_out() -> None:
    config = {"legacy": False, "add_bos_token": False}
    tokenizer = Tokenizer.from_text(*from_sentencepiece(MODEL, config, NOTHING))
    assert tokenizer.encode("a") == SPM.encode("a")


def test_added_tokens_are_known() -> None:
    text, rules = from_sentencepiece(MODEL, {}, Declared({1000: AddedToken("<pad>")}))
    tokenizer = Tokenizer.from_text(text, rules)
    assert tokenizer.encode("a<pad>")[-1] == 1000
    assert (tokenizer.id_of("<pad>"), tokenizer.id_of("<nope>")) == (1000, None)
    assert tokenizer.size == 1001
    assert token_of(text, 1000) == "<pad>"
    assert token_of(text, 300) == SPM.id_to_piece(300)
    with pytest.raises(ConfigError, match="1001"):
        token_of(text, 1001)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(ANY_TEXT)
def test_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = TOKENIZERS[False]
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(BLANK, " ")
    assert tokenizer.decode(tokenizer.encode(text)) == SPM.decode(SPM.encode(text))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(ANY_TEXT)
def test_a_byte_tokenizer_has_one_id_for_each_byte(text: str) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(byte_tokenizer({"<s>": 1, "</s>": 2}))
    ids = inner.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(text.encode())
    assert Tokenizer(inner).decode(ids) == text
    assert Tokenizer(inner).encode("</s>a")[0] == 2


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        from_sentencepiece(tmp_path / "tokenizer.model", {}, NOTHING)
    with pytest.raises(CheckpointError, match="missing"):
        from_sentencepiece(tmp_path / "missing", {}, NOTHING)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.open(tmp_path / "tokenizer.json")


# -- streaming -----------------------------------------------------------------------------

BYTE_LEVEL = Tokenizer.open(BYTES)
REPLACED = "\ufffd"


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def byte_ids(data: bytes) -> list[int]:
    """Llama's pieces for single bytes."""
    return [SPM.piece_to_id(f"<0x{value:02X}>") for value in data]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.integers(0, BYTE_LEVEL.size - 1), max_size=25))
def test_any_ids_of_a_byte_level_tokenizer_stream(ids: list[int]) -> None:
    assert "".join(streamed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.integers(259, SPM.get_piece_size() - 1).map(lambda i: [i]),
            st.integers(0, 2).map(lambda i: [i]),
            st.characters(exclude_categories=["Cs"]).map(lambda c: byte_ids(c.encode())),
        ),
        max_size=20,
    )
)
def test_any_ids_of_llama_with_whole_characters_stream(characters: list[list[int]]) -> None:
    ids = [token for character in characters for token in character]
    tokenizer = TOKENIZERS[False]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.sampled_from(["llama", "bytes"]), ANY_TEXT)
@example("llama", "a🙂\n👩‍👩‍👧 b")
@example("bytes", "a🙂\n👩‍👩‍👧 b")
@example("bytes", "a🙂<|endoftext|>🙂 b")
@example("llama", "a🙂</s>🙂 b")
def test_no_piece_ends_within_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[False] if kind == "llama" else BYTE_LEVEL
    text = text.replace(REPLACED, "?").replace(BLANK, " ")
    ids = tokenizer.encode(text)
    found = streamed(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    if not any(name in text for name in tokenizer.special_tokens.values()):
        assert "".join(found) == text  # a special token's name is that token, which is no text
    assert not any(REPLACED in piece for piece in found)


def test_an_emoji_appears_with_its_last_byte() -> None:
    assert streamed(TOKENIZERS[False], byte_ids("🙂".encode())) == ["", "", "", "🙂", ""]
    ids = BYTE_LEVEL.encode("🙂")
    assert len(ids) > 1
    assert streamed(BYTE_LEVEL, ids) == [*[""] * (len(ids) - 1), "🙂", ""]


@pytest.mark.parametrize("start", [b"", b"\n", "é".encode(), "中🙂".encode()])
@pytest.mark.parametrize("broken", [b"\xf0", b"\xf0\x9f\x99", b"\xff\xfe", b"\x80"])
def test_broken_bytes_become_signs_and_the_stream_goes_on(start: bytes, broken: bytes) -> None:
    words = SPM.encode("and then")
    found = streamed(TOKENIZERS[False], [*byte_ids(start), *byte_ids(broken), *words])
    assert "".join(found) == start.decode() + REPLACED * len(broken) + " and then"
    assert "and" in "".join(found[: len(start) + len(broken) + 1 + len(SPM.encode("and"))])
    assert found[-1] == ""


def test_an_unfinished_character_at_the_end_is_a_sign() -> None:
    for start in (b"", b"\n", "é".encode()):
        found = streamed(TOKENIZERS[False], byte_ids(start + b"\xf0\x9f"))
        assert "".join(found) == start.decode() + REPLACED * 2
