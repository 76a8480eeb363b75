"""What changes logits before a token is chosen: penalties and banned tokens.

The order and the meaning are those of transformers' `generate` (transformers,
generation/logits_process.py). What a step needs of earlier tokens is kept from step to step, so
that a token costs one copy of the logits and work on the ids concerned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence
from edgevlm.toolkit.vlm.generation import GenerationRules


class Processors:
    """The processors of one reply: `process` changes logits, `add` tells the token chosen then.

    prompt_ids: the ids of the prompt that count as seen. prompt_tokens: the positions of the whole
    prompt, for min_length. eos: the ids that min_length and min_new_tokens ban.
    """

    def __init__(
        self,
        rules: GenerationRules,
        prompt_ids: Sequence[int],
        prompt_tokens: int,
        eos: Sequence[int],
        vocab: int,
    ) -> None:
        self._vocab, self._added = vocab, 0
        self._penalty = np.float32(rules.repetition_penalty)
        self._eos = _within(eos, vocab)
        self._fewest = _fewest_tokens(rules, prompt_tokens)
        self._never = _within(rules.suppress_tokens, vocab)
        self._first = _within(rules.begin_suppress_tokens, vocab)
        words = [word for word in rules.bad_words_ids if list(word) not in [[i] for i in eos]]
        single = _within((word[0] for word in words if len(word) == 1), vocab)
        self._never = np.union1d(self._never, single)
        self._words = _by_prefix(word for word in words if len(word) > 1)
        self._longest = max((len(prefix) for prefix in self._words), default=0)
        self._ngrams = _NGrams(rules.no_repeat_ngram_size) if rules.no_repeat_ngram_size else None
        self._seen = _Distinct() if self._penalty != 1 else None
        self._tail: list[int] = []
        self._banning = bool(
            len(self._never) or len(self._first) or self._words or self._ngrams or self._fewest
        )
        for token in prompt_ids:
            self._remember(token)

    def process(self, logits: Array) -> Array:
        """The logits [vocab] to choose the next token from; `logits` stay as they are.

        Raises InputError if every token is banned.
        """
        if self._seen is None and not self._banning:
            return logits
        scores = logits.astype(np.float32)
        if self._seen is not None:
            seen = self._seen.ids
            values = scores[seen]
            scores[seen] = np.where(values < 0, values * self._penalty, values / self._penalty)
        if self._banning:
            self._ban(scores)
        return scores

    def _ban(self, scores: Array) -> None:
        scores[self._never] = -math.inf
        if self._ngrams is not None:
            scores[_within(self._ngrams.banned(), self._vocab)] = -math.inf
        for size in range(1, self._longest + 1):
            last = self._words.get(tuple(self._tail[-size:]))
            if last is not None and len(self._tail) >= size:
                scores[last] = -math.inf
        if self._added < self._fewest:
            scores[self._eos] = -math.inf
        if self._added == 0:
            scores[self._first] = -math.inf
        if scores.max() == -math.inf:
            raise InputError(
                "the checkpoint's generation rules ban every token of the vocabulary",
                hint="`edgevlm inspect` shows the rules; --allow-banned sets aside the banned "
                "tokens, and --no-repeat-ngram 0 the runs",
            )

    def add(self, token: int) -> None:
        """The answer has one more token."""
        self._added += 1
        self._remember(token)

    def _remember(self, token: int) -> None:
        if self._seen is not None and 0 <= token < self._vocab:
            self._seen.add(token)
        if self._ngrams is not None:
            self._ngrams.add(token)
        if self._longest:
            self._tail = [*self._tail, token][-self._longest :]


class _Distinct:
    """Distinct ids, in a buffer that grows by doubling."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._buffer = np.zeros(64, np.int64)

    @property
    def ids(self) -> Array:
        """The ids, in the order of their first use."""
        return self._buffer[: len(self._known)]

    def add(self, token: int) -> None:
        if token in self._known:
            return
        if len(self._known) == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.zeros_like(self._buffer)])
        self._buffer[len(self._known)] = token
        self._known.add(token)


class _NGrams:
    """Which tokens followed each run of `size` - 1 tokens."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._tail: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], _Distinct] = {}

    def add(self, token: int) -> None:
        if len(self._tail) == self._size - 1:
            self._followers.setdefault(self._tail, _Distinct()).add(token)
        self._tail = (*self._tail, token)[max(len(self._tail) + 2 - self._size, 0) :]

    def banned(self) -> Array:
        """Ids that would complete a run of `size` tokens that occurred before."""
        found = self._followers.get(self._tail) if len(self._tail) == self._size - 1 else None
        return np.zeros(0, np.int64) if found is None else found.ids


def _fewest_tokens(rules: GenerationRules, prompt_tokens: int) -> int:
    """The tokens before which no answer may end."""
    if rules.min_new_tokens is not None:
        return rules.min_new_tokens
    return max(rules.min_length - prompt_tokens, 0)


def _within(ids: Iterable[int] | Array, vocab: int) -> Array:
    """The ids that are rows of the vocabulary; others cannot be chosen anyway."""
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    return array[(array >= 0) & (array < vocab)]


def _by_prefix(words: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Array]:
    """The last ids of the words by what stands before them."""
    found: dict[tuple[int, ...], list[int]] = {}
    for *prefix, last in words:
        found.setdefault(tuple(prefix), []).append(last)
    return {prefix: np.asarray(ids, np.int64) for prefix, ids in found.items()}


def settled(rules: GenerationRules, sampling: Sampling) -> GenerationRules:
    """The checkpoint's rules with what the question sets instead."""
    if sampling.repetition_penalty is not None:
        rules = replace(rules, repetition_penalty=float(sampling.repetition_penalty))
    if sampling.no_repeat_ngram is not None:
        rules = replace(rules, no_repeat_ngram_size=int(sampling.no_repeat_ngram))
    if sampling.allow_banned:
        rules = replace(rules, suppress_tokens=(), begin_suppress_tokens=(), bad_words_ids=())
    return rules


def counted_ids(sequence: PromptSequence, image_id: int | None) -> list[int]:
    """The ids of a prompt as Hugging Face's models get it: the image token at image positions.

    image_id None: those positions have no id, which is written as -1.
    """
    absent = -1 if image_id is None else image_id
    ids: list[int] = np.where(sequence.rows >= 0, absent, sequence.ids)[0].tolist()
    return ids


def sampling_notes(rules: GenerationRules, sampling: Sampling) -> tuple[str, ...]:
    """A note for a greedy answer of a checkpoint whose settings ask for sampling."""
    if not rules.do_sample or sampling.temperature != 0:
        return ()
    stated = "".join(f", {name} {value:g}" for name, value in rules.sampling.items())
    return (f"the checkpoint asks for sampling (do_sample{stated}); this answer is greedy",)
