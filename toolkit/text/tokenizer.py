"""The tokenizer: ids from text, and text from ids without splitting a character.

The package `tokenizers` does the work. This file adds what the originals do around it, and
converts a sentencepiece model (the only tokenizer file of the first LLaVA releases) to its format.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.toolkit.errors import CheckpointError, ConfigError, MissingExtra

if TYPE_CHECKING:
    import tokenizers

_BROKEN = "\ufffd"  # what decoding gives for bytes that are not (yet) a character
_PREFIX = "\u2581"  # sentencepiece's visible blank


class Tokenizer:
    """A tokenizer.json.

    doubled_blank: a leading blank of the text is kept besides the one that sentencepiece adds.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, doubled_blank: bool = False) -> None:
        self._inner = inner
        self._doubled_blank = doubled_blank
        self._rewritten: tuple[str, Tokenizer] | None = None

    @classmethod
    def open(cls, path: Path, *, doubled_blank: bool = False) -> Tokenizer:
        """From tokenizer.json. Raises ConfigError if the file cannot be read."""
        import tokenizers

        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), doubled_blank=doubled_blank)
        except Exception as broken:  # the package raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer file: {broken}") from None

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def id_of(self, token: str) -> int | None:
        """The id of one token; None if the vocabulary lacks it."""
        number: int | None = self._inner.token_to_id(token)
        return number

    def added(self) -> dict[str, bool]:
        """The added tokens, and whether each is special."""
        tokens = self._inner.get_added_tokens_decoder().values()
        return {token.content: token.special for token in tokens}

    def rewritten(self, key: str, edit: Callable[[str], str]) -> Tokenizer:
        """This tokenizer with its tokenizer.json edited; the one of the last key is kept."""
        import tokenizers

        known = self._rewritten
        if known is None or known[0] != key:
            other = copy.copy(self)
            other._inner = tokenizers.Tokenizer.from_str(edit(self._inner.to_str()))
            other._rewritten = None
            self._rewritten = known = (key, other)
        return known[1]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; special: whether to add the tokens that surround a text (BOS)."""
        if self._doubled_blank and text.startswith((" ", _PREFIX)):
            text = " " + text
        return list(self._inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text


class TextStream:
    """Decodes ids one by one; the pieces joined are decode(all ids) if all characters are complete.

    Bytes that are no character give a replacement sign each; text printed before them stays.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._settled = 0  # the window that is decoded begins here; ids before it are printed
        self._printed = 0  # ids before this one have been printed

    def push(self, token: int) -> str:
        """The text that this id completes, often "" within a character."""
        self._ids.append(token)
        before, now = self._window()
        if now.endswith(_BROKEN) or len(now) <= len(before):
            return ""
        self._settled, self._printed = self._printed, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """The remaining text: an unfinished character becomes the replacement sign."""
        before, now = self._window()
        self._settled = self._printed = len(self._ids)
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        """The text that was printed last, and that text with everything since."""
        before = self._tokenizer.decode(self._ids[self._settled : self._printed])
        now = self._tokenizer.decode(self._ids[self._settled :])
        if now.startswith(before):
            return before, now
        # Beside invalid bytes, decoding may also replace bytes that formed a character before.
        return "", self._tokenizer.decode(self._ids[self._printed :])


# -- sentencepiece ---------------------------------------------------------------------------


def from_sentencepiece(model: Path, config: dict[str, Any]) -> tuple[str, bool]:
    """The text of a tokenizer.json that encodes as the slow Llama tokenizer of `model` does, and
    whether it needs `doubled_blank` for that.

    `config` is tokenizer_config.json: `legacy` decides whether text after a special token gets
    a blank of its own. Raises CheckpointError for models other than byte-fallback BPE.
    """
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtra("sentencepiece", "export", purpose=f"reading {model.name}") from None
    try:
        spm = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    except (OSError, RuntimeError) as broken:
        raise CheckpointError(f"{model} is not a sentencepiece model: {broken}") from None
    pieces = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    if not any(spm.is_byte(i) for i in range(len(pieces))):
        raise CheckpointError(f"{model} has no byte pieces; only byte-fallback BPE is implemented")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    normal = [p for i, p in enumerate(pieces) if not (spm.is_control(i) or spm.is_byte(i))]
    special = {i: p for i, p in enumerate(pieces) if spm.is_control(i) or spm.is_unknown(i)}
    special |= _added(config.get("added_tokens_decoder") or {}, model)
    merges = _merges(normal, vocab, [spm.get_score(i) for i in range(len(pieces))])
    bos = pieces[spm.bos_id()] if config.get("add_bos_token", True) else None
    legacy = config.get("legacy") is not False
    built = _llama_tokenizer(vocab, merges, special, bos, legacy=legacy)
    return json.dumps(built, ensure_ascii=False), not legacy


def _added(table: Any, model: Path) -> dict[int, str]:
    try:
        return {
            int(number): str(item["content"] if isinstance(item, dict) else item)
            for number, item in table.items()
        }
    except (AttributeError, KeyError, ValueError):
        raise ConfigError(
            f"{model.parent / 'tokenizer_config.json'}: added_tokens_decoder = {str(table)[:80]}, "
            "expected tokens by their ids"
        ) from None


def _merges(
    pieces: Sequence[str], vocab: dict[str, int], scores: Sequence[float]
) -> list[list[str]]:
    """BPE merges in order of rank: a piece of higher score is merged first."""
    ranked = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[vocab[piece]], vocab[left], vocab[right], left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in ranked]


# A blank before every stretch of text between special tokens, even if it starts with one.
_BLANKS_ALWAYS = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _PREFIX},
        {"type": "Replace", "pattern": {"String": " "}, "content": _PREFIX},
    ],
}
# A blank before the text unless it starts with one; `doubled_blank` handles that case.
_BLANK_FIRST = {
    "type": "Metaspace",
    "replacement": _PREFIX,
    "prepend_scheme": "first",
    "split": False,
}


def _llama_tokenizer(
    vocab: dict[str, int],
    merges: list[list[str]],
    special: dict[int, str],
    bos: str | None,
    *,
    legacy: bool,
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": t, **flags, "special": True} for i, t in sorted(special.items())]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": _BLANKS_ALWAYS if legacy else None,
        "pre_tokenizer": None if legacy else _BLANK_FIRST,
        "post_processor": None if bos is None else _prepend_bos(bos, vocab[bos]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _PREFIX}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": special.get(0, "<unk>"),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab | {content: i for i, content in special.items()},
            "merges": merges,
        },
    }


def _prepend_bos(bos: str, number: int) -> dict[str, Any]:
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            token,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def token_of(text: str, number: int) -> str:
    """The token with this id in a tokenizer.json's text. Raises ConfigError if there is none."""
    data = json.loads(text)
    for token in data.get("added_tokens", []):
        if token["id"] == number:
            return str(token["content"])
    for token, known in data.get("model", {}).get("vocab", {}).items():
        if known == number:
            return str(token)
    raise ConfigError(
        f"the tokenizer has no token with the id {number}, which stands for images",
        hint="the tokenizer belongs to another model",
    )


def byte_tokenizer(special: Mapping[str, int]) -> str:
    """A tokenizer.json of 256 bytes and `special` tokens: for presets, which ship none."""
    alphabet = _byte_alphabet()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": t, **flags, "special": True}
        for t, i in sorted(special.items(), key=lambda item: item[1])
    ]
    taken = set(special.values())
    free = [i for i in range(256 + len(taken)) if i not in taken][:256]
    # An added token keeps its id only if the vocabulary has it too.
    vocab = dict(zip(alphabet, free, strict=True)) | dict(special)
    layer = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": layer,
            "decoder": layer,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
    )


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0-255, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(stand_ins)) for b in range(256)]
