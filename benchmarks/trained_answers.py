"""How exact a language model must be to give the same answers, for benchmarks/trained.py: in NumPy.

Models that are rounded in several ways read the float model's own answers. Where one of them would
choose every token itself, its own answer is the same. All that is not named stays in float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trained_text import ANSWER, QUESTIONS
from edgevlm import Question, Session
from edgevlm.calibration import unsampled
from edgevlm.calibration.greedy import same_until
from edgevlm.calibration.many import Many, ManyOps
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.vlm.components import lm_component, no_states

TABLE = "embed.weight"


@dataclass(frozen=True)
class Bits:
    """weights, inputs: bits of the layers' linears, None for float. block: of their inputs that
    share a step; None: a whole row of inputs, a whole column of weights. table: whether the
    embedding table is in 8 bits; output: also where it makes logits. floats: ends of the paths of
    linears that stay in float.
    """

    weights: int | None = None
    inputs: int | None = None
    block: int | None = None
    table: bool = False
    output: bool = False
    floats: tuple[str, ...] = ()


FORMS: Mapping[str, Bits] = {
    "table in 8 bits": Bits(table=True, output=True),
    "table in 8 bits, output layer in float": Bits(table=True),
    "as int8-rows": Bits(8, 8, table=True, output=True),
    "as int8-blocks": Bits(8, 8, 128, table=True, output=True),
    "8 bits in blocks of 32": Bits(8, 8, 32),
    "weights alone, 8 bits by column": Bits(8),
    "weights alone, 8 bits in blocks of 32": Bits(8, block=32),
    "inputs alone, 8 bits by row": Bits(inputs=8),
    "inputs alone, 8 bits in blocks of 32": Bits(inputs=8, block=32),
    **{f"{bits} bits": Bits(bits, bits) for bits in range(9, 14)},
    **{f"weights alone, {bits} bits": Bits(bits) for bits in (10, 11)},
    **{f"inputs alone, {bits} bits": Bits(inputs=bits) for bits in (10, 11, 12)},
    "8 bits, v in float": Bits(8, 8, floats=("attention/v",)),
    "8 bits, v and down in float": Bits(8, 8, floats=("attention/v", "mlp/down")),
    "8 bits, only gate rounded": Bits(
        8, 8, floats=("attention/q", "attention/k", "attention/v", "out", "up", "down")
    ),
}


@dataclass(frozen=True)
class Found:
    """same: answers; tokens: share that are chosen; kl: mean divergence from float, in nats."""

    same: int
    tokens: float
    kl: float


def measured(bundle: Path, engine: Path) -> tuple[dict[str, Found], list[float]]:
    """Every form of a float bundle's language model; and for each question the least lead of the
    likeliest token over the next, in logits, that the float engine's answer has.
    """
    model = _Model(bundle, engine)
    plain = [*model.logits(Bits())]
    leads = [float(np.diff(np.partition(x, -2)[:, -2:]).min()) for x in plain]
    return {name: model.compared(form, plain) for name, form in FORMS.items()}, leads


class _Model:
    """The language model, and what it reads: prompts, behind them the float engine's answers."""

    def __init__(self, bundle: Path, engine: Path) -> None:
        source = systems.load(bundle, Options())
        self._lm, name = lm_component(source.model.lm), source.model.lm.name
        smooth = unsampled.smoothed(replace(source, plan=PrecisionPlan("int8_rows")))
        self._smooth = {k: np.asarray(x, np.float32) for k, x in smooth.weights[name].items()}
        self._plain = {k: np.asarray(x, np.float32) for k, x in source.weights[name].items()}
        asked, said = _asked(bundle), _said(engine)
        self._ids = Many(np.array([a + b]) for a, b in zip(asked, said, strict=True))
        self._said = [np.array(answer) for answer in said]

    def logits(self, form: Bits) -> Iterator[Array]:
        """[S, vocabulary] at each token of each answer."""
        weights = dict(self._plain if form.block else self._smooth)
        table, small = weights[TABLE], _in_8_bits(weights[TABLE])
        weights[TABLE] = small if form.table else table
        longest = max(x.shape[1] for x in self._ids)
        inputs = {
            "ids": self._ids,
            "rows": Many(np.full_like(x, -1) for x in self._ids),
            "features": np.zeros((1, table.shape[1]), np.float32),
            "start": np.zeros(1, np.int64),
            "score": Many(np.arange(x.shape[1])[None] for x in self._ids),
            **no_states(self._lm.inputs, self._lm.outputs, {"batch": 1, "context": longest}),
        }
        found = self._lm.forward(_Rounding(form), Weights(weights), inputs)["logits"]
        for x, said in zip(found, self._said, strict=True):
            yield x[0, -len(said) - 1 : -1] @ (small if form.output else table).T

    def compared(self, form: Bits, plain: Sequence[Array]) -> Found:
        """One form beside the float model's logits."""
        same, chosen, kl = 0, list[Array](), list[Array]()
        for said, a, b in zip(self._said, plain, self.logits(form), strict=True):
            same += same_until(said, b.argmax(-1)) == len(said)
            chosen.append(b.argmax(-1) == said)
            p, q = _log(a), _log(b)
            kl.append((np.exp(p) * (p - q)).sum(-1))
        shares = (float(np.concatenate(x).mean()) for x in (chosen, kl))
        return Found(same, *shares)


class _Rounding(ManyOps):
    """The linears of the layers as a form has them."""

    def __init__(self, form: Bits) -> None:
        super().__init__()
        self._form = form

    def linear(self, x: Many, w: Weights[Any]) -> Many:
        form = self._form
        if not w.path.startswith("layers.") or (form.floats and w.path.endswith(form.floats)):
            return super().linear(x, w)
        weight = np.asarray(w["weight"], np.float32)
        if form.weights:
            weight = np.ascontiguousarray(_rounded(weight.T, form.weights, form.block).T)
        if form.inputs:
            x = Many(_rounded(one, form.inputs, form.block) for one in x)
        return super().linear(x, w.replacing(weight=weight))


def _rounded(x: Array, bits: int, block: int | None) -> Array:
    """x [..., D], each row, or block of a row, in steps of its own largest value."""
    size = blockwise.block_of(x.shape[-1], block) if block else x.shape[-1]
    parts = x.reshape(*x.shape[:-1], -1, size or x.shape[-1])
    steps = np.abs(parts).max(-1, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
    steps = np.maximum(steps, np.float32(1e-30))
    return np.asarray((np.rint(parts / steps) * steps).reshape(x.shape))


def _in_8_bits(table: Array) -> Array:
    return blockwise.dequantize(*blockwise.quantize(table, 8), 8)


def _asked(bundle: Path) -> list[list[int]]:
    """The questions as tokens, by the language model's own chat template."""
    opened = Bundle.open(bundle)
    rules, tokenizer = opened.vlm.prompts, opened.tokenizer()
    rendered = (prompts.render(rules, [question], 0, "auto") for question in QUESTIONS)
    return [list(prompts.tokenize(rules, tokenizer, one).runs[0]) for one in rendered]


def _said(engine: Path) -> list[list[int]]:
    """The float engine's greedy answers, with the token that ends those that end."""
    with Session.open(engine, threads=1) as session:
        answers = (session.answer(Question(text, max_tokens=ANSWER)) for text in QUESTIONS)
        return [list(answer.token_ids) for answer in answers]


def _log(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
