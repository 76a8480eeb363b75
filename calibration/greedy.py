"""Greedy answers of a float language model, and whether one in other weights would give them too.

The float model answers by itself. The other one reads prompt and answer at once: where it would
choose every token of the answer itself, its own answer is the same, and where it would not, its
answer begins to differ. So it runs once, not once a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.vlm.components import Component, zero_states

ANSWER = 16  # tokens
PROMPT = 32  # tokens of a text, of which an answer is asked
_PROMPTS = 24  # the most that are cut from a text


@dataclass(frozen=True)
class Agreement:
    """Of `prompts`, the answers of `tokens` tokens that are the same, and how many tokens are until
    the first that is not.
    """

    prompts: int
    tokens: int
    same: int
    same_tokens: float

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"{self.same} of {self.prompts} answers of {self.tokens} tokens as in float, "
            f"{self.same_tokens:.1f} tokens until the first other one"
        )


def prompts_of(windows: Array) -> Array:
    """Prompts [N, S] from windows of text: beginnings of equal parts of each."""
    length = min(PROMPT, windows.shape[1])
    each = max(min(windows.shape[1] // length, _PROMPTS // len(windows)), 1)
    starts = np.linspace(0, windows.shape[1] - length, each).astype(np.int64)
    cut = [window[start : start + length] for window in windows for start in starts]
    return np.stack(cut[:_PROMPTS])


def compare(
    lm: Component, plain: Mapping[str, Array], rounded: Mapping[str, Array], prompts: Array
) -> Agreement:
    """The language model in `rounded` weights beside that in `plain` ones, for prompts of ids."""
    width = int(next(port.shape[1] for port in lm.inputs if port.name == "features"))
    inputs = {
        "ids": prompts,
        "rows": np.full_like(prompts, -1),
        "features": np.zeros((1, width), np.float32),
    }
    answers = answered(lm, NumpyOps(), plain, inputs)
    both = np.concatenate([prompts, answers], 1)
    states = hidden(lm, ManyOps(), rounded, both[:, :-1])
    last = Many(x[:, prompts.shape[1] - 1 :] for x in states)
    return agreement(answers, [_chosen(lm, rounded, x) for x in last])


def answered(
    lm: Component,
    ops: Any,
    weights: Mapping[str, Any],
    inputs: Mapping[str, Array],
    load: Callable[[Array], Any] = np.asarray,
    read: Callable[[Any], Array] = np.asarray,
) -> Array:
    """ANSWER tokens [N, ANSWER] that continue prompts of one length, without regard to which of
    them would end an answer. inputs: ids and rows [N, S], features. load, read: from an array to a
    tensor of `ops`, and back.
    """
    count, length = inputs["ids"].shape
    axes = {"batch": count, "context": length + ANSWER}
    states: Mapping[str, Any] = {
        name: load(x) for name, x in zero_states(lm.inputs, lm.outputs, axes).items()
    }
    given = {**inputs, "start": np.zeros(count, np.int64)}
    given["score"] = np.full((count, 1), length - 1)
    chosen = list[Array]()
    while True:
        tensors = {name: load(x) for name, x in given.items()}
        outputs = lm.forward(ops, Weights(weights), {**tensors, **states})
        chosen.append(read(outputs["logits"])[:, -1].argmax(-1))
        if len(chosen) == ANSWER:
            return np.stack(chosen, 1)
        states = {port.updates: outputs[port.name] for port in lm.outputs if port.updates}
        given["ids"], given["rows"] = chosen[-1][:, None], np.full((count, 1), -1)
        given["start"] = np.full(count, length + len(chosen) - 1)
        given["score"] = np.zeros((count, 1), np.int64)


def agreement(answers: Array, chosen: Sequence[Array]) -> Agreement:
    """Of answers [N, S], with what another model chooses at each of their tokens."""
    until = [same_until(*pair) for pair in zip(answers, chosen, strict=True)]
    whole = sum(count == answers.shape[1] for count in until)
    return Agreement(len(answers), answers.shape[1], whole, float(np.mean(until)))


def same_until(answer: Array, chosen: Array) -> int:
    """How many tokens of an answer are chosen as well before the first that is not."""
    same = answer == chosen
    return len(same) if same.all() else int(same.argmin())


def _chosen(lm: Component, weights: Mapping[str, Array], x: Array) -> Array:
    """The likeliest tokens [S], from the output of the last norm [1, S, D]."""
    w: Weights[Array] = Weights(weights)
    ops = NumpyOps()
    tied = "head.weight" not in lm.shapes
    logits = ops.unembed(x[0], w / "embed") if tied else ops.linear(x[0], w / "head")
    return np.asarray(logits.argmax(-1))
