"""Where an answer's text ends: before the first stop string, which may span several tokens.

Special tokens are no part of the text, yet a stop string may contain one, as "<|im_end|>" does.
Those are matched by their ids: where such a token comes, its name takes part in the comparison and
is left out of what is released.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgevlm.toolkit.text.tokenizer import TextStream, Tokenizer


class StoppingText:
    """Streams text and ends it before a stop string; holds back what may become one."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._special = tokenizer.special_tokens
        self._stops: list[str] = []
        self._names: dict[int, str] = {}  # of the special tokens inside stop strings
        self._held = ""
        self._hidden: list[bool] = []  # for each character held: is it of a special token's name
        self.text = ""
        self.stopped = False
        for text in stop:
            self.add_stop(text)

    def add_stop(self, stop: str) -> None:
        """One more stop string (the template's)."""
        self._stops += [stop] if stop else []
        self._names |= {i: name for i, name in self._special.items() if name and name in stop}

    def push(self, token: int) -> str:
        """The text that is certain to belong to the answer after this token."""
        new, name = self._stream.push(token), self._names.get(token, "")
        new += self._stream.finish() if name else ""  # no character goes on behind the name
        return self._release(new, name, final=False)

    def finish(self) -> str:
        """What was held back; nothing after a stop string."""
        return self._release(self._stream.finish(), "", final=True)

    def _release(self, new: str, name: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new + name
        hidden = [*self._hidden, *[False] * len(new), *[True] * len(name)]
        matches = [(text.find(s) + len(s), text.find(s)) for s in self._stops if s in text]
        if matches:  # the stop string that ends first, wherever its tokens end
            self.stopped, end, keep = True, min(matches)[1], 0
        else:
            keep = 0 if final else max((_overlap(text, s) for s in self._stops), default=0)
            end = len(text) - keep
        self._held, self._hidden = text[len(text) - keep :], hidden[len(text) - keep :]
        out = "".join(c for c, h in zip(text[:end], hidden, strict=False) if not h)
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
