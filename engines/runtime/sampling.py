"""From logits to a token: greedy, or drawn from a seed after temperature, top-k and top-p.

A vocabulary has 152,000 rows and a token should cost less than a millisecond, so they are
never all sorted: thresholds select candidates in float32, and up to a few thousand candidates are
weighed in float64.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgevlm.toolkit.errors import AccuracyError, ConfigError
from edgevlm.toolkit.ops.vocabulary import Array

Sampler = Callable[[Array], int]
_EXACT = 4096  # up to so many are sorted, and weighed in float64
_LIKELY = 1024  # the best that are tried as a nucleus before a threshold is searched
_BLOCK = 512  # weights that are summed at a time when one is drawn
_INTERVAL = 1 << 18  # bits of float32 weights: a 32nd of an octave
_STRIDE = 32  # every 32nd weight tells roughly where the smallest one kept lies
# Temperatures beyond these are 0 or infinite in float32. At the smaller one only the largest logits
# have a weight, at the larger one all have the same.
_TEMPERATURES = 1e-30, 1e30


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep everything; seed None differs each time.

    repetition_penalty (1 is off) and no_repeat_ngram (0 is off) count at every temperature; None
    takes the checkpoint's. allow_banned: whether the tokens may occur that the checkpoint bans
    (suppress_tokens, begin_suppress_tokens, bad_words_ids).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    allow_banned: bool = False

    def check(self) -> None:
        """Raise ConfigError for values without a meaning."""
        self._check_types()
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature} is not a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} is not in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k} is negative")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"--seed {self.seed} is negative")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"--repetition-penalty {self.repetition_penalty} is not above 0")
        if self.no_repeat_ngram is not None and self.no_repeat_ngram < 0:
            raise ConfigError(f"--no-repeat-ngram {self.no_repeat_ngram} is negative")
        if self.temperature == 0 and (self.top_k, self.top_p) != (0, 1.0):
            raise ConfigError(
                "--top-k and --top-p have no effect at --temperature 0",
                hint="add --temperature 1, or drop them",
            )

    def _check_types(self) -> None:
        optional = ("seed", "repetition_penalty", "no_repeat_ngram")
        numbers = ("temperature", "top_p", "repetition_penalty")
        for name in ("temperature", "top_p", "top_k", *optional):
            value = getattr(self, name)
            if name not in optional or value is not None:
                _converted(name, value, float if name in numbers else operator.index)
        if not isinstance(self.allow_banned, bool):
            raise ConfigError(f"allow_banned = {self.allow_banned!r:.80}, expected True or False")


def _converted(name: str, value: object, convert: Callable[..., object]) -> None:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        convert(value)
    except (TypeError, ValueError, OverflowError):
        option = name.replace("_", "-")
        kind = "number" if convert is float else "whole number"
        raise ConfigError(f"--{option} {value!r:.80} is not a {kind}") from None


def sampler(sampling: Sampling) -> Sampler:
    """A function from logits [vocab] to a token id. It raises AccuracyError for NaN."""
    sampling.check()
    if sampling.temperature == 0:
        return _greedy
    generator = np.random.default_rng(None if sampling.seed is None else int(sampling.seed))

    def sample(logits: Array) -> int:
        ids, weights = survivors(logits, sampling)
        index = draw(weights, generator.random())
        return index if ids is None else int(ids[index])

    return sample


def _greedy(logits: Array) -> int:
    token = int(logits.argmax())
    _check_number(float(logits[token]))
    return token


def _check_number(best: float) -> None:
    """The largest logit is NaN if any of them is."""
    if not math.isfinite(best):
        raise AccuracyError(
            f"the language model's largest logit is {best}: there is no token to choose",
            hint="the weights or their precision are at fault: build and try the reference "
            "(--target reference), or a bundle in another --dtype",
        )


def survivors(logits: Array, sampling: Sampling) -> tuple[Array | None, Array]:
    """What may be drawn: ids in ascending order and their weights, which need not sum to 1.

    ids None: weights [vocab] of all tokens, 0 for those that may not be drawn. Of equal logits the
    one with the smaller id counts as better.
    """
    top = logits.max()
    _check_number(float(top))
    ids = best(logits, sampling.top_k) if 0 < sampling.top_k < len(logits) else None
    values = logits if ids is None else logits[ids]
    weights = _weights(values, top, sampling.temperature)
    if sampling.top_p == 1:
        return ids, weights
    total = float(weights.sum(dtype=np.float64))
    target = sampling.top_p * total * (1 - 1e-12)  # sums of the same weights round apart
    if len(values) > _EXACT:
        likely = best(values, _LIKELY) if target < _LIKELY else np.arange(0)  # no weight exceeds 1
        exact = _weights(values[likely], top, sampling.temperature)
        if exact.sum() < target:
            return ids, _nucleus(values, weights, total, target)
    else:
        likely, exact = np.arange(len(values)), weights
    kept = _smallest(values[likely], exact, target)
    nucleus = likely[kept]
    return (nucleus if ids is None else ids[nucleus]), exact[kept]


def _weights(values: Array, top: Array, temperature: float) -> Array:
    """exp((value - top) / temperature), at most 1: float64 for a few, float32 for many."""
    least, most = _TEMPERATURES
    kind = np.float64 if len(values) <= _EXACT else np.float32
    with np.errstate(over="ignore", under="ignore"):  # an underflow is 0
        scaled = values.astype(kind) - kind(top)
        scaled /= kind(min(max(temperature, least), most))
        return np.asarray(np.exp(scaled, out=scaled))


def best(values: Array, count: int) -> Array:
    """Ids of the `count` largest, in ascending order; of equals the first ones."""
    ids = np.flatnonzero(values >= _floor(values, count))
    if len(ids) == count:
        return ids
    candidates = values[ids]
    last = np.partition(candidates, len(candidates) - count)[len(candidates) - count]
    kept = candidates > last
    kept[np.flatnonzero(candidates == last)[: count - int(kept.sum())]] = True
    return np.asarray(ids[kept])


def _floor(values: Array, count: int) -> Array:
    """A value that at least `count` others reach, and not many more.

    The count-th largest of the maxima of blocks is one, as each of those blocks has such a value.
    Blocks take every n-th value: in a vocabulary, likely tokens stand next to one another.
    """
    rows = min(len(values) // (2 * count), 64)
    if rows < 2:
        return np.asarray(np.partition(values, len(values) - count)[len(values) - count])
    columns = len(values) // rows
    largest = values[: rows * columns].reshape(rows, columns).max(0)
    return np.asarray(np.partition(largest, columns - count)[columns - count])


def _smallest(values: Array, weights: Array, target: float) -> Array:
    """Indices, ascending, of the smallest set of best values whose weights reach `target`.

    Nucleus sampling (Holtzman et al., arXiv 1904.09751).
    """
    if not len(values) or values.min() == values.max():
        # Ties are in order, and each has the same weight.
        return np.arange(min(len(values), math.ceil(target / max(weights[0], 1e-300))))
    order = np.argsort(-values, kind="stable")
    count = int(np.searchsorted(weights[order].cumsum(), target)) + 1
    return np.sort(order[:count])


def _nucleus(values: Array, weights: Array, total: float, target: float) -> Array:
    """The same for many: float32 weights [n], 0 outside the nucleus.

    Searches the bits of the smallest weight kept, which ascend as the weights do, by two guesses
    and then by halves; each step is one sum over all. What shares the last interval is sorted.
    """
    # What weighs less than this makes up less than the rest, even if it is all of them.
    low, high = _bits(max(total - target, 0.0) / len(weights)), _bits(1.0) + 1
    guesses = _guesses(weights, target)
    while high - low > _INTERVAL:
        middle = guesses.pop() if guesses else (low + high) // 2
        if low < middle < high:
            reached = np.dot(weights, weights >= _from_bits(middle)) >= target
            low, high = (middle, high) if reached else (low, middle)
    above = weights >= _from_bits(high)
    between = np.flatnonzero((weights >= _from_bits(low)) & ~above)
    remaining = target - float((weights * above).sum(dtype=np.float64))
    if remaining > 0 and len(between):
        kept = _smallest(values[between], weights[between].astype(np.float64), remaining)
        above[between[kept]] = True
    return weights * above


def _guesses(weights: Array, target: float) -> list[int]:
    """Bits of a weight a little below and of one a little above the smallest that is kept.

    A sample tells where that lies; the sample's own error is measured there and taken out.
    """
    sample = np.sort(weights[::_STRIDE])[::-1]
    ends = sample.cumsum(dtype=np.float64)
    first = min(int(np.searchsorted(ends, target / _STRIDE)), len(sample) - 1)
    reached = float(np.dot(weights, weights >= sample[first]))
    index = int(np.searchsorted(ends, ends[first] + (target - reached) / _STRIDE))
    positions = (min(max(round(index * factor), 0), len(sample) - 1) for factor in (0.98, 1.02))
    return [_bits(sample[i]) for i in positions]


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _from_bits(bits: int) -> Array:
    return np.asarray(bits, np.int32).view(np.float32)


def draw(weights: Array, uniform: float) -> int:
    """The index at which the running sum of weights passes `uniform` (0 to 1) of their total."""
    whole = len(weights) // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(1)
    ends = np.append(sums, weights[whole:].sum()).cumsum(dtype=np.float64)
    point = uniform * ends[-1]
    block = min(int(np.searchsorted(ends, point, "right")), len(ends) - 1)
    sums_in_block = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    index = int(
        np.searchsorted(sums_in_block, point - (ends[block - 1] if block else 0.0), "right")
    )
    if index < len(sums_in_block):
        return block * _BLOCK + index
    return int(np.flatnonzero(weights[: (block + 1) * _BLOCK])[-1])  # sums round apart
