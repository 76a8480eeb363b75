"""Byte-level BPE from vocab.json and merges.txt, as the slow classes of GPT-2 and Qwen2 save it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import read_json
from edgevlm.toolkit.text.added_tokens import AddedToken

# The words that Qwen2's BPE works on: Qwen2Tokenizer of transformers.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
# Special tokens that a class has where tokenizer_config.json does not name them.
_DEFAULTS = {
    "Qwen2Tokenizer": ("unk_token", "eos_token", "pad_token"),
    "GPT2Tokenizer": ("unk_token", "bos_token", "eos_token"),
}


def from_vocabulary(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a folder with vocab.json and merges.txt, without added tokens.

    `config` is tokenizer_config.json, whose tokenizer_class says how text becomes words. Raises
    ConfigError for other classes and for files that are broken.
    """
    name, vocab = tokenizer_class(folder, config), read_json(folder / "vocab.json")
    if not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise ConfigError(f"{folder / 'vocab.json'}: expected an id for each token")
    prefix = config.get("add_prefix_space") or False
    if not isinstance(prefix, bool):
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: add_prefix_space = {prefix!r}")
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}
    words: dict[str, Any] = {**level, "use_regex": True}
    if name == "Qwen2Tokenizer":
        split = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated",
                 "invert": False}  # fmt: skip
        words = {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if name == "Qwen2Tokenizer" else None,
        "pre_tokenizer": words,
        "decoder": {**level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": _merges(folder / "merges.txt")},
    }


def default_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """Special tokens that the class has although the configuration does not name them."""
    keys = _DEFAULTS[tokenizer_class(folder, config)]
    return (AddedToken(_END),) if any(key not in config for key in keys) else ()


def tokenizer_class(folder: Path, config: Mapping[str, Any]) -> str:
    """The slow name of the class in tokenizer_config.json. ConfigError for any other."""
    stated = config.get("tokenizer_class")
    name = str(stated).removesuffix("Fast")
    if name not in _DEFAULTS:
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class = {stated!r} is not implemented "
            "for vocab.json and merges.txt",
            hint=f"implemented: {', '.join(_DEFAULTS)}; or save a tokenizer.json into the folder",
        )
    return name


def _merges(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as broken:
        raise ConfigError(f"{path} cannot be read: {broken}") from None
    pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip()]
    pairs = [pair for number, pair in enumerate(pairs) if number or pair[0] != "#version:"]
    for pair in pairs:
        if len(pair) != 2:
            raise ConfigError(f"{path}: {' '.join(pair)[:40]!r}, expected two pieces in a line")
    return pairs
