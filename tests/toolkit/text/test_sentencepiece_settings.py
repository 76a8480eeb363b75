"""sentencepiece models with settings of their own: ids are those of the package itself."""

from __future__ import annotations

import io
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.text.added_tokens import AddedToken, Declared
from edgevlm.toolkit.text.sentencepiece_model import from_sentencepiece
from edgevlm.toolkit.text.sentencepiece_text import Charsmap
from edgevlm.toolkit.text.tokenizer import Tokenizer

NOTHING = Declared({})
BLANK = "\u2581"
SYMBOLS = ["<|im_start|>", "<|im_end|>", "<|im"]
LIKE_LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 400,
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "hard_vocab_limit": False,
    "minloglevel": 2,
}
WAYS: dict[str, dict[str, Any]] = {
    "as Llama": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "user symbols": {"user_defined_symbols": SYMBOLS},
    "no prefix, user symbols": {"add_dummy_prefix": False, "user_defined_symbols": SYMBOLS},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "nmt_nfkc_cf, user symbols": {
        "normalization_rule_name": "nmt_nfkc_cf",
        "user_defined_symbols": SYMBOLS,
    },
    "extra blanks removed": {"remove_extra_whitespaces": True},
    "sentencepiece's defaults": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "user_defined_symbols": SYMBOLS,
    },
    "defaults, no prefix": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "add_dummy_prefix": False,
    },
}
LINES = [
    "the picture shows a small red house beside the river",
    "a dog and a cat are sitting on the chair",
    "what is in the image ?",
    "user assistant system answer the questions",
] * 40
TEXTS = [
    "the image", "a  dog", "<|im_start|>user\nwhat<|im_end|>", "ﬁne ＡＢＣ", " cat ", "", " ",
    "   ", "<|im_start|>", " <|im_end|> ", "a<|im_sta", "\tthe\u3000\u00a0cat", "e\u0301",
    "\u1100\u1161",
    "ｶﾞ", "½", f"{BLANK}a", f" {BLANK} a", "x\u200by", "🙂", "\x07", "<0x41>", "İß", "\u0345ﷺ",
]  # fmt: skip
ANY_TEXT = st.lists(
    st.one_of(
        st.sampled_from(TEXTS),
        st.sampled_from([" ", "  ", "\n", "the", " cat", *SYMBOLS]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=8,
).map("".join)


@cache
def proto(way: str) -> bytes:
    made = io.BytesIO()
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(LINES), model_writer=made, **(LIKE_LLAMA | WAYS[way]))
    return made.getvalue()


@cache
def witness(way: str) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=proto(way))


def convert(folder: Path, data: bytes, config: Any, declared: Declared = NOTHING) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(data)
    return Tokenizer.from_text(*from_sentencepiece(folder / "tokenizer.model", config, declared))


@cache
def ours(way: str, legacy: bool) -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return convert(Path(folder), proto(way), {"legacy": legacy})


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_ids_are_those_of_sentencepiece(way: str, legacy: bool) -> None:
    for text in TEXTS:
        assert ours(way, legacy).encode(text, special=False) == witness(way).encode(text), text


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(text=ANY_TEXT)
def test_ids_of_any_text(way: str, legacy: bool, text: str) -> None:
    found = ours(way, legacy).encode(text)
    assert found == [1, *witness(way).encode(text)]
    if BLANK not in text:
        assert ours(way, legacy).decode(found) == witness(way).decode(found[1:])


def test_the_settings_matter() -> None:
    for text in ("<|im_start|>", "ﬁ", "a  b", "a"):
        assert len({tuple(witness(way).encode(text)) for way in WAYS}) > 1


# -- text around added tokens, as the slow tokenizer does it ----------------------------------


def slow(way: str, legacy: bool, folder: Path) -> Any:
    """transformers' own slow tokenizer over the model, with Llama's special tokens."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    (folder / "tokenizer.model").write_bytes(proto(way))
    backend: Any = SentencePieceBackend
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return backend(vocab_file=str(folder / "tokenizer.model"), legacy=legacy, **names)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "text", ["a</s> b", "a</s>b", "</s>  the cat  </s>", "<|im_start|>a</s><|im_end|> b", "</s>"]
)
def test_each_stretch_is_a_text_of_its_own_under_legacy(
    way: str, text: str, tmp_path: Path
) -> None:
    expected = slow(way, True, tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert ours(way, True).encode(text, special=False) == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", ["a</s> b", "a</s>b", "x</s>  the  cat </s>", "</s>"])
def test_later_stretches_go_on_without_legacy(way: str, text: str, tmp_path: Path) -> None:
    """The backend has no prefix of its own here; Llama's slow class puts a blank first."""
    bare = WAYS[way].get("add_dummy_prefix") is False or text.startswith("<")
    prefix = "" if bare else " "
    expected = slow(way, False, tmp_path)(prefix + text, add_special_tokens=False)["input_ids"]
    assert ours(way, False).encode(text, special=False) == expected


@pytest.mark.parametrize("legacy", [True, False])
def test_flags_of_added_tokens(legacy: bool, tmp_path: Path) -> None:
    left = AddedToken("<l>", lstrip=True)
    right = AddedToken("<r>", special=False, rstrip=True)
    word = AddedToken("<w>", single_word=True)
    declared = Declared({1000: left, 1001: right, 1002: word})
    tokenizer = convert(tmp_path, proto("as Llama"), {"legacy": legacy}, declared)
    spm = witness("as Llama")
    assert tokenizer.encode("the  <l>", special=False) == [*spm.encode("the"), 1000]
    after = spm.encode("cat") if legacy else spm.encode("\ncat")[2:]
    found = tokenizer.encode("the<r> \ncat", special=False)
    assert found == [*spm.encode("the"), 1001, *after]
    assert tokenizer.encode("a <w>", special=False) == [*spm.encode("a "), 1002]
    assert 1002 not in tokenizer.encode("a<w>b", special=False)
    assert tokenizer.decode([1000, 1001, 1002]).strip() == "<r>"


def test_a_symbol_that_is_declared_cuts_the_text(tmp_path: Path) -> None:
    """As in Yi's checkpoints: the chat marks are both symbols of the model and added tokens."""
    spm = witness("user symbols")
    declared = Declared({spm.piece_to_id("<|im_end|>"): AddedToken("<|im_end|>")})
    tokenizer = convert(tmp_path, proto("user symbols"), {"legacy": True}, declared)
    number = spm.piece_to_id("<|im_end|>")
    found = tokenizer.encode("a<|im_end|>b", special=False)
    assert found == [*spm.encode("a"), number, *spm.encode("b")]
    assert found != spm.encode("a<|im_end|>b")
    assert tokenizer.decode([number]) == ""


@pytest.mark.parametrize("way", ["as Llama", "no dummy prefix"])
def test_add_prefix_space_holds_without_legacy_only(way: str, tmp_path: Path) -> None:
    spm = witness(way)
    with_blank = spm.encode("the" if way == "as Llama" else " the")
    without = spm.encode("\nthe")[2 if way == "as Llama" else 1 :]
    assert with_blank != without
    for stated, expected in ((True, with_blank), (False, without)):
        new = {"legacy": False, "add_prefix_space": stated}
        assert convert(tmp_path, proto(way), new).encode("the", special=False) == expected
        old = {"legacy": True, "add_prefix_space": stated}
        found = convert(tmp_path, proto(way), old).encode("the", special=False)
        assert found == spm.encode("the")


def test_named_tokens_that_the_model_lacks_follow_it(tmp_path: Path) -> None:
    declared = Declared({}, (AddedToken("<pad>"), AddedToken("</s>")))
    tokenizer = convert(tmp_path, proto("as Llama"), {}, declared)
    assert tokenizer.id_of("<pad>") == witness("as Llama").get_piece_size()
    assert tokenizer.id_of("</s>") == 2


def test_long_texts_take_seconds_at_most() -> None:
    """Neither many added tokens nor long words may make the steps quadratic."""
    way = "sentencepiece's defaults"
    start = time.process_time()  # whatever else the machine does
    for text in ("a" * 200_000, " " * 200_000, "🙂" * 50_000, "<|im" * 50_000):
        assert ours(way, True).encode(text, special=False) == witness(way).encode(text)
    assert ours(way, True).encode("</s>" * 100_000, special=False) == [2] * 100_000
    assert time.process_time() - start < 60


def test_bos_is_the_one_that_is_named(tmp_path: Path) -> None:
    body = witness("as Llama").encode("the")
    for stated, first in (("<s>", [1]), ({"content": "</s>"}, [2]), (None, []), ("<b>", [400])):
        named = (AddedToken("<b>"),) if stated == "<b>" else ()
        config = {"bos_token": stated}
        tokenizer = convert(tmp_path, proto("as Llama"), config, Declared({}, named))
        assert tokenizer.encode("the") == first + body
    assert convert(tmp_path, proto("as Llama"), {}).encode("the") == [1, *body]
    without = convert(tmp_path, trained(bos_id=-1), {})
    assert without.encode("the") == without.encode("the", special=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_rewritten_tokenizer_keeps_the_steps(legacy: bool) -> None:
    tokenizer = ours("sentencepiece's defaults", legacy)
    other = tokenizer.rewritten("key", lambda text: text.replace("<|im_start|>", "[start]"))
    assert other is tokenizer.rewritten("key", str.upper)
    assert (tokenizer.added()["</s>"], other.added()["[start]"]) == (True, False)
    for text in ("<|im_start|>ﬁ  the</s> cat", " <|im_start|> "):
        found = other.encode(text.replace("<|im_start|>", "[start]"))
        assert found == tokenizer.encode(text)


# -- what is refused ---------------------------------------------------------------------------


def trained(**changes: Any) -> bytes:
    made = io.BytesIO()
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(LINES), model_writer=made, **(LIKE_LLAMA | changes))
    return made.getvalue()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unigram"}, "another kind of model"),
        ({"byte_fallback": False}, "no byte pieces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["the red"]}, "a user-defined symbol with a blank"),
    ],
)
def test_other_models_are_refused_by_name(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path, trained(**changes), {})


def test_an_end_token_after_each_piece_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add_eos_token"):
        convert(tmp_path, proto("as Llama"), {"add_eos_token": True})


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_a_file_that_is_cut_off_is_refused(cut: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        convert(tmp_path, proto("as Llama")[:-cut], {})


@pytest.mark.parametrize("blob", [b"", b"\x05\0\0\0abcd", b"\xff\0\0\0abcd"])
def test_a_broken_charsmap_is_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match="precompiled_charsmap"):
        Charsmap(blob)
