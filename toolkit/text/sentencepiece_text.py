"""What sentencepiece and its slow tokenizers do to a text before pieces are merged.

The package `tokenizers` can express these steps only nearly: its charsmap works on graphemes, and
it puts blanks before added tokens too. So a tokenizer.json made from a sentencepiece model is run
with the steps below in place of its own. Source: google/sentencepiece, src/normalizer.cc, and
LlamaTokenizer of transformers 4.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.toolkit.text.added_tokens import AddedToken

BLANK = "\u2581"  # sentencepiece's visible blank
_MOST_REPLACED = 1024  # bytes; Unicode decomposes a character into 33 at most
_BLANKS = re.compile(r"\s*")


@dataclass(frozen=True)
class SentencePieceRules:
    """The settings of a sentencepiece model and of its slow tokenizer.

    blank: a blank is put before a text. legacy: a stretch after an added token is encoded as if it
    were a text of its own. single_blanks: runs of blanks become one, and blanks at both ends go.
    symbols: ids of user-defined symbols, which are never split, merged or normalized.
    """

    blank: bool = True
    legacy: bool = False
    single_blanks: bool = False
    symbols: tuple[int, ...] = ()


class Charsmap:
    """The replacements of a model's normalizer: at each position the longest known prefix.

    The blob is a double-array trie (Darts-clone) over UTF-8, and the texts that its values point
    to. Raises ValueError if it is broken.
    """

    def __init__(self, blob: bytes) -> None:
        if len(blob) < 4 or (size := struct.unpack_from("<I", blob)[0]) > len(blob) - 4 or size % 4:
            raise ValueError("precompiled_charsmap is broken")
        self._units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self._texts = blob[4 + size :]

    def longest(self, data: bytes, start: int) -> tuple[int, str] | None:
        """Length in bytes of the longest known prefix of data[start:], and its replacement."""
        units, found = self._units, None
        at = _offset(units[0])
        for length, byte in enumerate(data[start : start + 256], 1):
            at ^= byte
            if at >= len(units) or units[at] & 0x800000FF != byte or not byte:
                break
            has_value = units[at] >> 8 & 1
            at ^= _offset(units[at])
            if has_value:
                found = length, units[at] & 0x7FFFFFFF
        if found is None:
            return None
        text = self._texts[found[1] : self._texts.index(b"\0", found[1])]
        if len(text) > _MOST_REPLACED:
            raise ValueError(f"precompiled_charsmap replaces {found[0]} bytes by {len(text)}")
        return found[0], text.decode()


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 1 << 9) >> 6)


@dataclass(frozen=True)
class TextSteps:
    """The steps for one tokenizer: rules, its added tokens, its charsmap and its symbols."""

    rules: SentencePieceRules
    added: Mapping[str, tuple[int, AddedToken]]
    charsmap: Charsmap | None
    symbols: tuple[str, ...] = ()

    def parts(self, text: str) -> Iterator[int | str]:
        """Ids of added tokens, and between them stretches ready for merging."""
        first = True
        for part in self._cut(text):
            if isinstance(part, str):
                yield self._prepared(part, first=first)
            else:
                number, token = part
                if first and not (self.rules.legacy or token.special or token.lstrip):
                    yield " " * self.rules.blank
                yield number
            first = False

    def _cut(self, text: str) -> Iterator[str | tuple[int, AddedToken]]:
        """The text cut at added tokens, without empty stretches."""
        start = 0
        for match in _any_of(self.added).finditer(text):
            begin, end = match.span()
            number, token = self.added[match.group()]
            alone = begin == start or text[begin - 1] == " "
            alone = alone and text[end : end + 1] in ("", " ")
            if begin < start or (token.single_word and not alone):
                continue
            before = text[start:begin].rstrip() if token.lstrip else text[start:begin]
            if before:
                yield before
            yield number, token
            after = _BLANKS.match(text, end) if token.rstrip else None
            start = after.end() if after else end
        if text[start:]:
            yield text[start:]

    def _prepared(self, stretch: str, *, first: bool) -> str:
        """A stretch after normalization, with its leading blank."""
        own = first or self.rules.legacy  # encoded as a text of its own
        prefix = " " * (self.rules.blank and own)
        if self.charsmap is None and not self.rules.single_blanks:
            return prefix + stretch
        units = list(self._units(stretch))
        if not self.rules.single_blanks:
            return prefix + "".join(units)
        body = _single_blanks(units, strip=own)
        return (prefix + body).rstrip(" " + BLANK) if body else ""

    def _units(self, stretch: str) -> Iterator[str]:
        """The normalized text, one symbol, replacement or character at a time."""
        data, symbols, at, char = stretch.encode(), _any_of(self.symbols), 0, 0
        while char < len(stretch):
            symbol = symbols.match(stretch, char)
            if symbol:
                taken, unit = len(symbol.group().encode()), symbol.group()
            else:
                mapped = self.charsmap.longest(data, at) if self.charsmap else None
                taken, unit = mapped or (len(stretch[char].encode()), stretch[char])
            yield unit
            char += len(data[at : at + taken].decode())
            at += taken


def _any_of(texts: Sequence[str] | Mapping[str, Any]) -> re.Pattern[str]:
    """Matches the longest of `texts`, nothing if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _single_blanks(units: Sequence[str], *, strip: bool) -> str:
    """The units joined, runs of blanks as one. strip: blanks in front go."""
    out: list[str] = []
    blank_before, leading = strip, strip
    for unit in units:
        if leading and unit == " ":
            continue
        leading = False
        unit = unit.lstrip(" ") if blank_before else unit
        if unit:
            out.append(unit)
            blank_before = unit.endswith(" ")
    return "".join(out)


def runtime_form(data: Mapping[str, Any], rules: SentencePieceRules) -> dict[str, Any]:
    """The tokenizer.json to run behind the steps: it only makes blanks visible and merges."""
    added = [{**item, "normalized": item["id"] in rules.symbols} for item in data["added_tokens"]]
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    return {**data, "added_tokens": added, "normalizer": visible, "pre_tokenizer": None}


def steps(data: Mapping[str, Any], rules: SentencePieceRules) -> TextSteps:
    """The steps for a tokenizer.json that toolkit/text/sentencepiece_model.py wrote."""
    added = {}
    for item in data["added_tokens"]:
        if item["id"] not in rules.symbols:
            flags = {key: value for key, value in item.items() if key != "id"}
            added[item["content"]] = (item["id"], AddedToken(**flags))
    charsmap = None
    for step in (data.get("normalizer") or {}).get("normalizers", []):
        if step["type"] == "Precompiled":
            charsmap = Charsmap(base64.b64decode(step["precompiled_charsmap"]))
    symbols = [t["content"] for t in data["added_tokens"] if t["id"] in rules.symbols]
    return TextSteps(rules, added, charsmap, tuple(symbols))
