"""The package tokenizers: its panics, and files that would fill the memory, are refused."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from edgevlm.toolkit.errors import ConfigError, silenced
from edgevlm.toolkit.text.panics import calm
from edgevlm.toolkit.text.tokenizer import Tokenizer, byte_tokenizer

PLAIN: dict[str, Any] = json.loads(byte_tokenizer({"<s>": 0}))


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def replacing(by: str, pattern: str = "a") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": by}


def opened(**changes: Any) -> Tokenizer:
    return Tokenizer.from_text(json.dumps(PLAIN | changes))


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
AT_A_TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern": ({"pre_tokenizer": split("(a+)+$")}, "retry-limit"),
    "a length of 0": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"),
    "a token that is none": ({"post_processor": TEMPLATE}, "no entry"),
    "no unknown token": (
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}, "pre_tokenizer": None},
        "WordLevel error",
    ),
}


@pytest.mark.parametrize("case", AT_A_TEXT)
def test_a_text_that_it_panics_at_is_refused(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    changes, reason = AT_A_TEXT[case]
    tokenizer = opened(**changes)
    with pytest.raises(ConfigError, match="fails at this text") as refused:
        tokenizer.encode("a" * 200 + "x" * 200 + "!")
    assert reason in refused.value.message
    assert capfd.readouterr() == ("", "")  # Rust prints a panic, with or without its backtrace


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "a charsmap that is none": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "precompiled_charsmap",
    ),
    "a pattern that is none": ({"pre_tokenizer": split("(")}, "parenthesis"),
    "a thousandfold": ({"normalizer": replacing("a" * 1000)}, "1e\\+03 times longer"),
    "a hundredfold, often": (
        {"normalizer": {"type": "Sequence", "normalizers": [replacing("a" * 50)] * 4}},
        "times longer, the limit is 64",
    ),
    "answers that grow": (
        {"decoder": {"type": "Sequence", "decoders": [replacing("b" * 99, "b")]}},
        "99 times longer",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_it_panics_at_or_that_fills_the_memory_is_refused(
    case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, reason = FILES[case]
    with pytest.raises(ConfigError, match=reason):
        opened(**changes)
    assert capfd.readouterr() == ("", "")


def test_padding_and_truncation_are_not_done() -> None:
    """A file may ask for padding to 10^9 tokens, which ends the process."""
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    truncation = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    expected = opened().encode("hello")
    assert len(expected) == 5
    assert opened(padding=padding, truncation=truncation).encode("hello") == expected


def test_interrupts_and_our_own_errors_pass() -> None:
    for error in (KeyboardInterrupt, MemoryError, ConfigError("ours")):
        with pytest.raises(type(error) if isinstance(error, Exception) else error), calm("no"):
            raise error
    with pytest.raises(ConfigError, match="no: a panic"), calm("no"):
        raise BaseException("a panic")


def test_standard_error_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    def work() -> None:
        for _ in range(200):
            with silenced(), silenced():
                os.write(2, b"unheard\n")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"
