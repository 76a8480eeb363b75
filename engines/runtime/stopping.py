"""Where an answer's text ends: before the first stop string, which may span several tokens."""

from __future__ import annotations

from collections.abc import Sequence

from edgevlm.toolkit.text.tokenizer import TextStream, Tokenizer


class StoppingText:
    """Streams text and ends it before a stop string; holds back what may become one."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = [s for s in stop if s]
        self._held = ""
        self.text = ""
        self.stopped = False

    def add_stop(self, stop: str) -> None:
        """One more stop string (the template's)."""
        self._stops += [stop] if stop else []

    def push(self, token: int) -> str:
        """The text that is certain to belong to the answer after this token."""
        return self._release(self._stream.push(token), final=False)

    def finish(self) -> str:
        """What was held back; nothing after a stop string."""
        return self._release(self._stream.finish(), final=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        matches = [(text.find(s) + len(s), text.find(s)) for s in self._stops if s in text]
        if matches:  # the stop string that ends first, wherever its tokens end
            self.stopped, self._held, out = True, "", text[: min(matches)[1]]
        else:
            keep = 0 if final else max((_overlap(text, s) for s in self._stops), default=0)
            self._held, out = text[len(text) - keep :], text[: len(text) - keep]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
