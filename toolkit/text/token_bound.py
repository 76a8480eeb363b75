"""How many tokens a text has at least, without tokenizing it: megabytes take seconds to tokenize.

A token stands for no more characters than its own text has, provided that the steps before only
replace or compose characters. Blanks do not count, since added tokens may swallow them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_COMPOSED = 4  # no character of Unicode decomposes into more (UAX #15), so none is made from more
_COMPOSING = ("NFC", "NFD", "NFKC", "NFKD")
_KEEPING = ("Prepend", "Lowercase")  # normalizers that drop and join nothing


@dataclass(frozen=True)
class TokenBound:
    """The most characters of a text that one token can stand for; None if that is not known."""

    most_characters: int | None

    def fewest(self, text: str) -> int:
        """A number of tokens that the text has at least."""
        if not self.most_characters:
            return 0
        return sum(map(len, text.split())) // self.most_characters


def bound_of(inner: tokenizers.Tokenizer) -> TokenBound:
    """From a tokenizer; not known where characters can vanish or unknown ones become one token."""
    composed = _normalized(_state(inner.normalizer))
    before, model = _state(inner.pre_tokenizer), inner.model
    split = _pre_tokenized(before)
    every_byte = getattr(model, "byte_fallback", False) or "ByteLevel" in _kinds(before)
    if composed is None or not split or not every_byte or type(model).__name__ != "BPE":
        return TokenBound(None)
    longest = max(map(len, inner.get_vocab(with_added_tokens=True)), default=0)
    return TokenBound(longest * composed)


def _state(step: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(step.__getstate__()) if step is not None else {}
    return found


def _parts(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step."""
    if state.get("type") == "Sequence":
        nested = state.get("normalizers") or state.get("pretokenizers") or []
        return [part for item in nested for part in _parts(item)]
    return [state] if state else []


def _kinds(state: dict[str, Any]) -> list[str]:
    return [str(part.get("type")) for part in _parts(state)]


def _normalized(state: dict[str, Any]) -> int | None:
    """How many characters may become one; None if the normalizer may drop any."""
    composed = 1
    for part in _parts(state):
        kind, pattern = part.get("type"), part.get("pattern", {})
        if kind in _COMPOSING:
            composed *= _COMPOSED
        elif not (kind in _KEEPING or (kind == "Replace" and pattern.get("String") == " ")):
            return None
    return composed


def _pre_tokenized(state: dict[str, Any]) -> bool:
    """Whether cutting drops no character."""
    return all(
        part.get("type") in ("ByteLevel", "Metaspace", "Digits")
        or (part.get("type") == "Split" and part.get("behavior") != "Removed")
        for part in _parts(state)
    )
