"""Tokens that are added to a vocabulary: how the files beside a tokenizer state them.

A tokenizer finds an added token in a text before its model cuts the rest into pieces. The flags
mean what they mean in the package `tokenizers`. The order of the files is that of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import from_plain, read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """One token. special: decoding leaves it out. lstrip, rstrip: it takes the blanks beside it.

    single_word: it is found only as a word of its own. normalized: it is looked for in the
    normalized text.
    """

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    def entry(self, number: int) -> dict[str, Any]:
        """The token as tokenizer.json writes it."""
        return {"id": number, **asdict(self)}


@dataclass(frozen=True)
class Declared:
    """What the files state: tokens with their ids, and special tokens by name only.

    wins: whether the flags of `ids` hold against those that tokenizer.json states.
    """

    ids: Mapping[int, AddedToken]
    named: tuple[AddedToken, ...] = ()
    wins: bool = True


def with_special_tokens(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """tokenizer_config.json with the named tokens that hold.

    Those of special_tokens_map.json come first, unless `config` has `added_tokens_decoder`.
    """
    path = folder / "special_tokens_map.json"
    if config.get("added_tokens_decoder") is not None or not path.exists():
        return config
    return {**config, **read_json(path)}


def read_declared(folder: Path, config: Mapping[str, Any]) -> Declared:
    """The added tokens of a folder whose tokenizer_config.json is `config`.

    `added_tokens_decoder` states ids and flags. Where it is absent, added_tokens.json states the
    ids, and a token there is special if tokenizer_config.json or special_tokens_map.json names it
    as one. Raises ConfigError naming the file for tokens that cannot be read.
    """
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    if config.get("added_tokens_decoder") is not None:
        ids = _decoder(config["added_tokens_decoder"], where)
        return Declared(ids, _named(config, folder / "tokenizer_config.json"))
    map_path, older = folder / "special_tokens_map.json", folder / "added_tokens.json"
    merged = with_special_tokens(folder, config)
    named = _named(merged, map_path if map_path.exists() else folder / "tokenizer_config.json")
    special = {token.content for token in named}
    ids = {}
    for content, number in (read_json(older) if older.exists() else {}).items():
        if type(number) is not int or number < 0:
            raise ConfigError(f"{older}: {content!r} = {number!r}, expected an id")
        known = content in special
        ids[number] = AddedToken(content, special=known, normalized=not known)
    return Declared(ids, named, wins=False)


def _decoder(table: Any, where: str) -> dict[int, AddedToken]:
    try:
        items = {int(number): dict(item) for number, item in table.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"{where} = {str(table)[:80]}, expected objects with `content` by their ids"
        ) from None
    return {number: _token(item, where, special=False) for number, item in items.items()}


def _token(item: Any, where: str, *, special: bool = True) -> AddedToken:
    """A token from text or from an object. special: what it is if the object does not say so."""
    if isinstance(item, str):
        return AddedToken(item)
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        raise ConfigError(f"{where}: {str(item)[:80]}, expected a token with its content")
    stated = {key: value for key, value in item.items() if key != "__type"}
    token = from_plain(AddedToken, {"special": special} | stated, where)
    if "normalized" in stated:
        return token
    return from_plain(AddedToken, {**asdict(token), "normalized": not token.special}, where)


def _named(config: Mapping[str, Any], path: Path) -> tuple[AddedToken, ...]:
    """The special tokens that a configuration names, each once, in its order."""
    items = [(key, config[key]) for key in NAMED if config.get(key) is not None]
    for key in _LISTS:
        several = config.get(key) or []
        values = several.values() if isinstance(several, dict) else several
        if not isinstance(several, (dict, list)):
            raise ConfigError(f"{path}: {key} = {several!r}, expected a list of tokens")
        items += [(key, value) for value in values]
    tokens = []
    for key, item in items:
        stated = {**item, "special": True} if isinstance(item, dict) else item
        tokens.append(_token(stated, f"{path}: {key}"))
    return tuple({token.content: token for token in reversed(tokens)}.values())[::-1]


# -- a tokenizer.json with the declared tokens ---------------------------------------------------


def with_declared(
    data: Mapping[str, Any], declared: Declared, where: str, *, slow: bool
) -> dict[str, Any]:
    """The tokenizer.json `data` with all declared tokens.

    slow: a slow tokenizer reads them. It gives a missing token the stated id even behind a gap. A
    fast one takes the next free id, and a token that tokenizer.json calls special stays special.
    Raises ConfigError if a token's ids contradict.
    """
    known = contents(data)
    size = len(known)
    added = {item["content"]: item for item in data.get("added_tokens") or []}
    for number, token in sorted(declared.ids.items()):
        _check_id(token.content, number, known, where, slow=slow)
        if token.content not in known:
            known[token.content] = number
        before = added.get(token.content)
        if declared.wins or before is None:
            special = token.special or bool(before and before["special"] and not slow)
            added[token.content] = replace(token, special=special).entry(number)
    for token in declared.named:
        if token.content not in known:
            known[token.content] = following(known)
        added.setdefault(token.content, token.entry(known[token.content]))
    return _with_entries(data, added.values(), len(known) > size)


def contents(data: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id."""
    vocab = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):  # a unigram model: pieces with their scores
        vocab = {item[0]: number for number, item in enumerate(vocab)}
    return {**vocab, **{item["content"]: item["id"] for item in data.get("added_tokens") or []}}


def following(known: Mapping[str, int]) -> int:
    """One more than the largest id."""
    return max(known.values(), default=-1) + 1


def _check_id(
    content: str, number: int, known: Mapping[str, int], where: str, *, slow: bool
) -> None:
    has = known.get(content)
    if has == number:
        return
    if has is None:
        has = following(known)
        if number not in known.values() and (slow or number == has):
            return
    raise ConfigError(
        f"{where} gives {content!r} the id {number}, by the tokenizer's own file it has {has}",
        hint="save the tokenizer again, so that its files agree",
    )


def _with_entries(
    data: Mapping[str, Any], added: Iterable[Mapping[str, Any]], new: bool
) -> dict[str, Any]:
    """A tokenizer.json with these added tokens. If some are new, all of them enter the model's
    vocabulary: the package `tokenizers` numbers those that it lacks anew, from its size."""
    out = {**data, "added_tokens": sorted(added, key=lambda item: int(item["id"]))}
    model = data.get("model") or {}
    if new and isinstance(model.get("vocab"), dict):
        ids = {item["content"]: item["id"] for item in out["added_tokens"]}
        out["model"] = {**model, "vocab": {**model["vocab"], **ids}}
    return out
