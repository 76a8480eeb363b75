"""The tokenizer of a checkpoint folder: whichever files it has, one tokenizer.json comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.strict import read_json
from edgevlm.toolkit.text import added_tokens, byte_level
from edgevlm.toolkit.text.added_tokens import AddedToken, Declared
from edgevlm.toolkit.text.sentencepiece_model import from_sentencepiece
from edgevlm.toolkit.text.sentencepiece_text import SentencePieceRules
from edgevlm.toolkit.text.tokenizer import Tokenizer


def read_tokenizer(folder: Path, *, slow: bool) -> tuple[str, SentencePieceRules | None]:
    """The text of a tokenizer.json, and its rules if it was made from a sentencepiece model.

    slow: the system uses the slow tokenizers, which take sentencepiece's own model where the
    folder has it (fast tokenizers converted by older transformers tokenize differently after
    special tokens) and give added tokens the ids that the files state. Raises CheckpointError
    where there is none of the files.
    """
    settings = folder / "tokenizer_config.json"
    config = read_json(settings) if settings.exists() else {}
    path, model = folder / "tokenizer.json", folder / "tokenizer.model"
    declared = added_tokens.read_declared(folder, config)
    if model.exists() and (slow or not path.exists()):
        named = added_tokens.with_special_tokens(folder, config)
        text, rules = from_sentencepiece(model, named, declared)
        return (text, rules) if slow else (_fast(text, rules, model), None)
    if path.exists():
        data = _reset(read_json(path))
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        data = byte_level.from_vocabulary(folder, config)
        defaults = byte_level.default_tokens(folder, config)
        declared = replace(declared, named=(*declared.named, *defaults))
    else:
        raise CheckpointError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with "
            "merges.txt)",
            hint="copy the tokenizer files of the language model into the folder",
        )
    text = _text(data, declared, str(settings), slow=slow or not path.exists())
    if slow:
        _check_ends(text, folder)
    return text, None


def _fast(text: str, rules: SentencePieceRules, model: Path) -> str:
    """The tokenizer.json that a fast tokenizer is without further steps.

    Raises CheckpointError for settings that it cannot express exactly.
    """
    listed = json.loads(text)["normalizer"]["normalizers"]
    odd = {
        "user-defined symbols": bool(rules.symbols),
        "remove_extra_whitespaces": rules.single_blanks,
        "a normalizer": any(step["type"] == "Precompiled" for step in listed),
    }
    for name, present in odd.items():
        if present:
            raise CheckpointError(
                f"{model}: {name} of sentencepiece is not implemented for fast tokenizers",
                hint="save the tokenizer with transformers, so that it has a tokenizer.json",
            )
    return text


def _check_ends(text: str, folder: Path) -> None:
    """Raise ConfigError if the tokenizer puts a token behind a text: every piece of a prompt that
    is tokenized on its own would end with it."""
    tokenizer = Tokenizer.from_text(text)
    if tokenizer.encode("a")[-1:] != tokenizer.encode("a", special=False)[-1:]:
        raise ConfigError(
            f"{folder / 'tokenizer.json'}: its post_processor ends every text with a token, which "
            "is not implemented for prompts that are tokenized in pieces",
            hint="remove the token from post_processor if the model answers prompts without it",
        )


def _reset(data: dict[str, Any]) -> dict[str, Any]:
    """Without truncation and padding: training leaves them in the file, and loaders turn them off
    before they tokenize a prompt."""
    return {**data, "truncation": None, "padding": None}


def _text(data: dict[str, Any], declared: Declared, where: str, *, slow: bool) -> str:
    try:
        data = added_tokens.with_declared(data, declared, where, slow=slow)
    except (AttributeError, KeyError, TypeError, ValueError) as odd:
        raise _unreadable(odd) from odd
    return json.dumps(data, ensure_ascii=False)


def _unreadable(odd: Exception) -> ConfigError:
    return ConfigError(f"the tokenizer cannot be read: {odd} in its added_tokens or vocab")


def add_tokens(text: str, extra: Sequence[str]) -> str:
    """The tokenizer with the special tokens that the originals' loader adds."""
    declared = Declared({}, tuple(map(AddedToken, extra)))
    return _text(json.loads(text), declared, "the loader", slow=True)


def check_tokenizer(text: str, vocab: int, where: str, needed: Sequence[str] = ()) -> int:
    """The number of embedding rows that the tokenizer can use, at most `vocab`.

    The originals' loader gives random rows to added tokens that have none. Here such a token
    stays without one, and a prompt that contains it is refused. Raises CheckpointError if a piece
    of the vocabulary itself or one of the tokens `needed` has no row.
    """
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as broken:  # the package raises bare Exception
        raise ConfigError(f"{where}: the tokenizer cannot be read: {broken}") from None
    added = inner.get_added_tokens_decoder()
    known = inner.get_vocab(with_added_tokens=True)
    size = 1 + max(known.values(), default=-1)
    if any(number >= vocab and number not in added for number in known.values()):
        raise CheckpointError(
            f"{where}: the tokenizer knows ids up to {size - 1}, the model has {vocab} rows",
            hint="the tokenizer belongs to another model",
        )
    for token in needed:
        if known[token] >= vocab:
            raise CheckpointError(
                f"{where}: the model has no row for {token}, which surrounds images",
                hint="its embedding was not saved; if it was trained without the token, set "
                "mm_use_im_start_end (COMM: use_im_start_end) to false in config.json",
            )
    return min(size, vocab)
