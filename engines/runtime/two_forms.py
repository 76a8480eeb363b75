"""A language model in two forms: one number format for prompts, another for single tokens.

Both read and write the same KV cache, so either may go on where the other stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgevlm.engines.backends import LayerTime, Runner
from edgevlm.engines.backends.state import State
from edgevlm.toolkit.ops.vocabulary import Array


class TwoForms:
    """A Runner of two. prompts: only fills the cache; tokens: has the output layer.

    What is scored is read by `tokens`, one position at a time: of a prompt that is its last one.
    A session reads tokens that were guessed by `tokens` itself, all in one call.
    """

    def __init__(self, prompts: Runner, tokens: Runner) -> None:
        self._prompts, self.tokens = prompts, tokens

    def new_state(self, slots: int = 1) -> State:
        return self.tokens.new_state(slots)

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """As Runner says; outputs [slots, scored, channels], with 0 channels if none is scored."""
        length, score = inputs["ids"].shape[1], inputs["score"]
        if length == 1:
            return self.tokens.run(inputs, state)
        first = int(score.min()) if score.size else length
        if first:
            self._prompts.run(_piece(inputs, 0, first), state)
        if not score.size:
            return {"logits": np.zeros((*score.shape, 0), np.float32)}
        found: dict[str, dict[int, Array]] = {}
        for at in range(first, length):
            outputs = self.tokens.run(_piece(inputs, at, at + 1), state)
            for name, output in outputs.items():
                found.setdefault(name, {})[at] = output[:, 0].copy()
        return {name: _picked(tokens, score) for name, tokens in found.items()}

    def layers(self) -> list[LayerTime]:
        times = [
            LayerTime(f"{form}/{time.name}", time.op, time.total_ms, time.calls)
            for form, runner in (("prompts", self._prompts), ("tokens", self.tokens))
            for time in runner.layers()
        ]
        return sorted(times, key=lambda time: -time.total_ms)

    def close(self) -> None:
        self._prompts.close()
        self.tokens.close()


def _picked(tokens: Mapping[int, Array], score: Array) -> Array:
    """What is scored, of what tokens gave for every slot, by position."""
    return np.asarray(
        [[tokens[int(at)][slot] for at in positions] for slot, positions in enumerate(score)]
    )


def _piece(inputs: Mapping[str, Array], begin: int, end: int) -> dict[str, Array]:
    """The tokens [begin, end) of a call; a single one is scored, several are not."""
    slots = len(inputs["ids"])
    return {
        "ids": inputs["ids"][:, begin:end],
        "rows": inputs["rows"][:, begin:end],
        "features": inputs["features"],
        "start": inputs["start"] + begin,
        "score": np.zeros((slots, int(end - begin == 1)), np.int64),
    }
