"""From a sentencepiece model (tokenizer.model) to a tokenizer.json, by the model's own settings.

The file is a protocol buffer, sentencepiece_model.proto of google/sentencepiece. Its pieces and
settings are read here; the package checks that it is a model at all.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import CheckpointError, ConfigError, needing
from edgevlm.toolkit.text.added_tokens import AddedToken, Declared
from edgevlm.toolkit.text.sentencepiece_text import BLANK, SentencePieceRules

_NORMAL, _UNKNOWN, _CONTROL, _SYMBOL, _UNUSED, _BYTE = range(1, 7)
_BPE = 2


@dataclass(frozen=True)
class Piece:
    """One piece: its text, its score (higher is merged first) and its type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Model:
    """What a model file states: its pieces, and its settings by the numbers of their fields."""

    pieces: tuple[Piece, ...]
    trainer: Mapping[int, int | bytes]
    normalizer: Mapping[int, int | bytes]
    denormalizer: Mapping[int, int | bytes]


def from_sentencepiece(
    path: Path, config: Mapping[str, Any], declared: Declared
) -> tuple[str, SentencePieceRules]:
    """The text of a tokenizer.json, and the rules under which it encodes as the slow tokenizer.

    `config` is tokenizer_config.json, `declared` the added tokens beside the model. Raises
    CheckpointError for models other than byte-fallback BPE and for settings that are not
    implemented.
    """
    model = read_model(path)
    _check(model, path)
    if config.get("add_eos_token"):
        raise ConfigError(
            f"{path.parent / 'tokenizer_config.json'}: add_eos_token = true would end every piece "
            "of a prompt with the end token; it is not implemented",
            hint="set add_eos_token to false if the model answers prompts without it",
        )
    rules, added = _rules(model, config, declared), _added(model, declared)
    bos = _bos(model, config, added) if config.get("add_bos_token", True) else None
    built = _tokenizer(model, added, rules, bos)
    return json.dumps(built, ensure_ascii=False), rules


def _rules(model: Model, config: Mapping[str, Any], declared: Declared) -> SentencePieceRules:
    """legacy is the default of the slow tokenizer, which then ignores add_prefix_space."""
    legacy = config.get("legacy") is not False
    blank = bool(model.normalizer.get(3, 1))
    if not legacy and config.get("add_prefix_space") is not None:
        blank = bool(config["add_prefix_space"])
    taken = {token.content for token in (*declared.ids.values(), *declared.named)}
    symbols = [
        number
        for number, piece in enumerate(model.pieces)
        if piece.type == _SYMBOL and piece.text not in taken and number not in declared.ids
    ]
    return SentencePieceRules(blank, legacy, bool(model.normalizer.get(4, 1)), tuple(symbols))


def _bos(
    model: Model, config: Mapping[str, Any], added: Mapping[str, tuple[int, AddedToken]]
) -> int | None:
    """The id of the configuration's bos_token, else that of the model; None if null or neither."""
    stated = config.get("bos_token", "")
    if stated is None:
        return None
    content = str(stated.get("content") if isinstance(stated, dict) else stated)
    if content in added:
        return added[content][0]
    own = model.trainer.get(41, 1)
    return own if isinstance(own, int) and own >= 0 else None


def _added(model: Model, declared: Declared) -> dict[str, tuple[int, AddedToken]]:
    """Added tokens by content: what the files declare, then the model's own special pieces."""
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    out = {token.content: (number, token) for number, token in declared.ids.items()}
    for number, piece in enumerate(model.pieces):
        if piece.type in (_UNKNOWN, _CONTROL) and number not in declared.ids:
            out.setdefault(piece.text, (number, AddedToken(piece.text)))
        if piece.type == _SYMBOL:
            out.setdefault(piece.text, (number, AddedToken(piece.text, special=False)))
    for token in declared.named:
        following = max(len(ids), *(number + 1 for number, _ in out.values()))
        out.setdefault(token.content, (ids.get(token.content, following), token))
    return out


def _check(model: Model, path: Path) -> None:
    types = {piece.type for piece in model.pieces}
    if model.trainer.get(3, 1) != _BPE or _BYTE not in types:
        kind = "no byte pieces" if model.trainer.get(3, 1) == _BPE else "another kind of model"
        raise CheckpointError(f"{path} has {kind}; only byte-fallback BPE is implemented")
    odd = {
        "unused pieces": _UNUSED in types,
        "a user-defined symbol with a blank": any(
            " " in piece.text for piece in model.pieces if piece.type == _SYMBOL
        ),
        "treat_whitespace_as_suffix": bool(model.trainer.get(24, 0)),
        "escape_whitespaces = false": not model.normalizer.get(5, 1),
        "a denormalizer": bool(model.denormalizer.get(2, b"")),
    }
    for name, present in odd.items():
        if present:
            raise CheckpointError(
                f"{path}: {name} of sentencepiece is not implemented",
                hint="a tokenizer.json made by transformers is read without this setting",
            )


# -- the file ------------------------------------------------------------------------------------


def read_model(path: Path) -> Model:
    """The pieces and settings of a model file. Raises CheckpointError if it is none."""
    with needing("sentencepiece", "export", purpose=f"reading {path.name}"):
        import sentencepiece
    try:
        data = path.read_bytes()
        sentencepiece.SentencePieceProcessor(model_proto=data)
        fields = list(_fields(data))
        pieces = tuple(_piece(value) for number, value in fields if number == 1)
    except (OSError, RuntimeError, ValueError, struct.error) as broken:
        raise CheckpointError(f"{path} is not a sentencepiece model: {broken}") from None
    last: dict[int, bytes] = {n: v for n, v in fields if isinstance(v, bytes)}
    trainer, normalizer, other = (dict(_fields(last.get(n, b""))) for n in (2, 3, 5))
    return Model(pieces, trainer, normalizer, other)


def _piece(data: int | bytes) -> Piece:
    fields = dict(_fields(bytes(data)))
    score = struct.unpack("<f", bytes(fields.get(2, bytes(4))))[0]
    return Piece(bytes(fields[1]).decode(), float(score), int(fields.get(3, _NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol buffer: an int, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value - (value >> 63 << 64)  # negative numbers fill 64 bits
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"a field of type {key & 7}")
        if at + size > len(data):
            raise ValueError("the file is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("the file is cut off")


# -- tokenizer.json ------------------------------------------------------------------------------


def _tokenizer(
    model: Model,
    added: Mapping[str, tuple[int, AddedToken]],
    rules: SentencePieceRules,
    bos: int | None,
) -> dict[str, Any]:
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    entries = [token.entry(number) for number, token in added.values()]
    first = None if bos is None else _content(bos, model, added)
    unknown = next((p.text for p in model.pieces if p.type == _UNKNOWN), "<unk>")
    return {
        "version": "1.0",
        "added_tokens": sorted(entries, key=lambda item: int(item["id"])),
        "normalizer": _normalizer(model, rules),
        "pre_tokenizer": _BLANK_FIRST if rules.blank and not rules.legacy else None,
        "post_processor": None if first is None else _prepend(first, bos or 0),
        "decoder": {"type": "Sequence", "decoders": _decoders(rules)},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab | {content: number for content, (number, _) in added.items()},
            "merges": _merges(model.pieces),
        },
    }


# A blank before the text unless it starts with one: what loaders without our rules do.
_BLANK_FIRST = {
    "type": "Metaspace",
    "replacement": BLANK,
    "prepend_scheme": "first",
    "split": False,
}


def _normalizer(model: Model, rules: SentencePieceRules) -> dict[str, Any]:
    """The steps as far as tokenizer.json can express them; TextSteps does them exactly."""
    charsmap = model.normalizer.get(2, b"")
    listed: list[dict[str, Any]] = []
    if isinstance(charsmap, bytes) and charsmap:
        encoded = base64.b64encode(charsmap).decode()
        listed.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if rules.single_blanks:
        listed.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        listed.append({"type": "Strip", "strip_left": True, "strip_right": True})
    if rules.blank and rules.legacy:
        listed.append({"type": "Prepend", "prepend": BLANK})
    listed.append({"type": "Replace", "pattern": {"String": " "}, "content": BLANK})
    return {"type": "Sequence", "normalizers": listed}


def _decoders(rules: SentencePieceRules) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return [*listed, strip] if rules.blank or rules.single_blanks else listed


def _content(number: int, model: Model, added: Mapping[str, tuple[int, AddedToken]]) -> str:
    """The token with this id: an added one, or the model's piece."""
    named = [content for content, (its, _) in added.items() if its == number]
    return named[0] if named else model.pieces[number].text


def _prepend(token: str, number: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first = [special, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """BPE merges in order of rank: a piece of higher score is merged first."""
    normal = {p.text: (n, p.score) for n, p in enumerate(pieces) if p.type == _NORMAL}
    ranked = []
    for piece, (_, score) in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, normal[left][0], normal[right][0], left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in ranked]
