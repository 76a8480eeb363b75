"""The tokenizer: ids from text, and text from ids without splitting a character.

The package `tokenizers` does the work, behind the steps of toolkit/text/sentencepiece_text.py if
the tokenizer.json was made from a sentencepiece model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.text import sentencepiece_text
from edgevlm.toolkit.text.panics import calm, tame
from edgevlm.toolkit.text.sentencepiece_text import SentencePieceRules
from edgevlm.toolkit.text.token_bound import TokenBound, bound_of

if TYPE_CHECKING:
    import tokenizers

_FAILED = "the tokenizer fails at this text (its tokenizer.json is at fault)"
_BROKEN = "\ufffd"  # what decoding gives for bytes that are not (yet) a character


class Tokenizer:
    """A tokenizer.json.

    steps: what happens to a text before, if the file was made from a sentencepiece model. rows:
    how many ids the language model has embeddings for; None if that is not known.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        steps: sentencepiece_text.TextSteps | None = None,
        rows: int | None = None,
    ) -> None:
        self._inner, self._steps, self._rows = inner, steps, rows
        self._text: str | None = None  # the file, where it is not what `inner` says
        self._rewritten: tuple[str, Tokenizer] | None = None
        self._bound: TokenBound | None = None

    @classmethod
    def open(
        cls, path: Path, rules: SentencePieceRules | None = None, rows: int | None = None
    ) -> Tokenizer:
        """From tokenizer.json. Raises ConfigError if the file cannot be read."""
        try:
            return cls.from_text(path.read_text(encoding="utf-8"), rules, rows)
        except OSError as refused:
            raise ConfigError(f"{path} cannot be read: {refused.strerror}") from None
        except (ConfigError, ValueError) as broken:
            raise ConfigError(f"{path} is not a tokenizer file: {broken}") from None

    @classmethod
    def from_text(
        cls, text: str, rules: SentencePieceRules | None = None, rows: int | None = None
    ) -> Tokenizer:
        """From the text of a tokenizer.json. Raises ConfigError if it cannot be read."""
        import tokenizers

        with calm("the tokenizer cannot be read"):
            if rules is None:
                return cls(tame(tokenizers.Tokenizer.from_str(text)), None, rows)
            data = json.loads(text)
            form = json.dumps(sentencepiece_text.runtime_form(data, rules))
            steps = sentencepiece_text.steps(data, rules)
            made = cls(tame(tokenizers.Tokenizer.from_str(form)), steps, rows)
            made._text = text
        return made

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def id_of(self, token: str) -> int | None:
        """The id of one token; None if the vocabulary lacks it."""
        number: int | None = self._inner.token_to_id(token)
        return number

    @property
    def special_tokens(self) -> dict[int, str]:
        """The tokens that `decode` leaves out, by id."""
        added = self._inner.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; special: whether to add the tokens that surround a text (BOS). Raises
        ConfigError if the tokenizer fails at it.
        """
        with calm(_FAILED):
            return self._ids_of(text, special)

    def _ids_of(self, text: str, special: bool) -> list[int]:
        if self._steps is None:
            return list(self._inner.encode(text, add_special_tokens=special).ids)
        ids = list(self._inner.encode("", add_special_tokens=True).ids) if special else []
        for part in self._steps.parts(text):
            if isinstance(part, str):
                ids += self._inner.encode(part, add_special_tokens=False).ids
            else:
                ids.append(part)
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, found without tokenizing it; 0 if unknown.

        The first call goes through the vocabulary.
        """
        if self._bound is None:
            maps = self._steps is not None and self._steps.charsmap is not None
            self._bound = TokenBound(None) if maps else bound_of(self._inner)
        return self._bound.fewest(text)

    def added(self) -> dict[str, bool]:
        """The added tokens, and whether each is special."""
        tokens = self._inner.get_added_tokens_decoder().values()
        return {token.content: token.special for token in tokens}

    def rewritten(self, key: str, edit: Callable[[str], str]) -> Tokenizer:
        """This tokenizer with its tokenizer.json edited; the one of the last key is kept."""
        known = self._rewritten
        if known is None or known[0] != key:
            rules = self._steps.rules if self._steps else None
            text = self._text or self._inner.to_str()
            other = Tokenizer.from_text(edit(text), rules, self._rows)
            self._rewritten = known = (key, other)
        return known[1]

    def check_rows(self, ids: Sequence[int]) -> None:
        """Raise InputError naming the first token that the model has no embedding for."""
        for number in ids:
            if self._rows is not None and number >= self._rows:
                raise InputError(
                    f"the prompt contains {self._inner.id_to_token(number)!r}, which the model has "
                    f"no embedding for (id {number} of {self._rows} rows)",
                    hint="leave it out of the prompt; the checkpoint was saved without its row",
                )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens. Raises ConfigError where the tokenizer fails."""
        try:
            text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        except BaseException as broken:  # a panic of Rust is no Exception
            if isinstance(broken, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise ConfigError(f"the tokenizer fails at an answer: {broken}") from None
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


# -- tokenizer.json as text ------------------------------------------------------------------


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
        hint="the tokenizer belongs to another model, or the token is only in added_tokens.json, "
        "which counts where tokenizer_config.json has no added_tokens_decoder",
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
