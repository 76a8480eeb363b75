"""Penalties and banned tokens: each step equals transformers' processors, and costs little."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from edgevlm.engines.backends.common import best_seconds
from edgevlm.engines.runtime.processors import Processors, counted_ids, sampling_notes, settled
from edgevlm.engines.runtime.sampling import Sampling, sampler
from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence
from edgevlm.toolkit.vlm.generation import GenerationRules
from tests.engines.runtime.test_sampling import by_transformers, drawn_from

VOCAB = 12
IDS = st.integers(0, VOCAB - 1)
RULES = st.builds(
    GenerationRules,
    repetition_penalty=st.sampled_from([1.0, 1.05, 1.5, 0.7]),
    no_repeat_ngram_size=st.integers(0, 5),
    bad_words_ids=st.lists(st.lists(IDS, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    min_length=st.integers(0, 12),
    min_new_tokens=st.none() | st.integers(0, 4),
    suppress_tokens=st.lists(st.integers(0, VOCAB + 3), max_size=2).map(tuple),
    begin_suppress_tokens=st.lists(st.integers(0, VOCAB + 3), max_size=2).map(tuple),
)


def chain(rules: GenerationRules, prompt: int, eos: list[int]) -> list[Any]:
    """transformers' processors for these rules, in the order of `generate`."""
    ends = torch.tensor(eos)
    found: list[Any] = []
    if rules.repetition_penalty != 1:
        found += [theirs.RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)]
    if rules.no_repeat_ngram_size:
        found += [theirs.NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size)]
    words = [list(word) for word in rules.bad_words_ids]
    if [word for word in words if word not in [[i] for i in eos]]:
        found += [theirs.NoBadWordsLogitsProcessor(words, ends)]
    if rules.min_new_tokens is None:
        found += [theirs.MinLengthLogitsProcessor(rules.min_length, ends)]
    else:
        fewest = rules.min_new_tokens
        found += [theirs.MinNewTokensLengthLogitsProcessor(prompt, fewest, ends)]
    if rules.suppress_tokens:
        found += [theirs.SuppressTokensLogitsProcessor(rules.suppress_tokens)]
    if rules.begin_suppress_tokens:
        begin = rules.begin_suppress_tokens
        found += [theirs.SuppressTokensAtBeginLogitsProcessor(begin, prompt)]
    return found


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    RULES,
    st.lists(IDS, min_size=1, max_size=9),
    st.lists(IDS, max_size=8),
    st.lists(IDS, min_size=1, max_size=2, unique=True),
    st.integers(0, 1000),
)
def test_every_step_equals_that_of_transformers(
    rules: GenerationRules, prompt: list[int], answer: list[int], eos: list[int], seed: int
) -> None:
    """Also where the tokens chosen are not those that the logits favour."""
    generator = np.random.default_rng(seed)
    ours = Processors(rules, prompt, len(prompt), eos, VOCAB)
    processors = chain(rules, len(prompt), eos)
    for number in range(len(answer) + 1):
        logits = generator.normal(0, 3, VOCAB).astype(np.float32)
        given_logits = logits.copy()
        ids = torch.tensor([[*prompt, *answer[:number]]])
        expected = torch.from_numpy(logits.copy())[None]
        for processor in processors:
            expected = processor(ids, expected)
        if torch.isinf(expected).all():
            with pytest.raises(InputError, match="ban every token"):
                ours.process(logits)
        else:
            np.testing.assert_array_equal(ours.process(logits), expected[0].numpy())
        np.testing.assert_array_equal(logits, given_logits)  # the engine's buffer
        ours.add(answer[number] if number < len(answer) else 0)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.lists(IDS, max_size=VOCAB - 1, unique=True),
    st.sampled_from([0, 1, 3, 9, 100]),
    st.sampled_from([1.0, 0.9, 0.4]),
    st.integers(0, 1000),
)
def test_what_is_drawn_from_the_rest_is_what_transformers_draws_from(
    banned: list[int], top_k: int, top_p: float, seed: int
) -> None:
    sampling = Sampling(0.8, top_k, top_p, seed)
    logits = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
    ours = Processors(GenerationRules(suppress_tokens=tuple(banned)), [], 0, (), VOCAB)
    left = ours.process(logits)
    found = drawn_from(left, sampling)
    assert found == pytest.approx(by_transformers(left, sampling), abs=1e-6)
    assert not {*banned} & {sampler(sampling)(left), *found}


def test_without_rules_the_logits_are_passed_on() -> None:
    logits = np.zeros(VOCAB, np.float32)
    assert Processors(GenerationRules(), [1, 2], 2, (2,), VOCAB).process(logits) is logits


def test_ids_beyond_the_vocabulary_are_seen_but_not_changed() -> None:
    """An image token may have an id without a row in the head."""
    rules = GenerationRules(repetition_penalty=2.0, no_repeat_ngram_size=2)
    ours = Processors(rules, [3, 99, 3, -1, 3], 5, (), VOCAB)
    found = ours.process(np.ones(VOCAB, np.float32))
    assert np.flatnonzero(found != 1).tolist() == [3]


def test_image_positions_count_as_the_image_token() -> None:
    sequence = PromptSequence(np.asarray([[5, 0, 0, 6]]), np.asarray([[-1, 0, 1, -1]]))
    assert counted_ids(sequence, 9) == [5, 9, 9, 6]
    assert counted_ids(sequence, None) == [5, -1, -1, 6]


def test_the_question_goes_before_the_checkpoint() -> None:
    rules = GenerationRules(repetition_penalty=1.5, no_repeat_ngram_size=3)
    assert settled(rules, Sampling()) == rules
    assert settled(rules, Sampling(repetition_penalty=1)).repetition_penalty == 1.0
    assert settled(rules, Sampling(no_repeat_ngram=0)).no_repeat_ngram_size == 0
    bans = replace(rules, suppress_tokens=(1,), begin_suppress_tokens=(2,), bad_words_ids=((3, 4),))
    assert settled(bans, Sampling()) == bans
    assert settled(bans, Sampling(allow_banned=True)) == rules


def test_a_note_is_for_greedy_answers_of_checkpoints_that_sample() -> None:
    asks = GenerationRules(do_sample=True, sampling={"temperature": 0.2, "top_k": 20})
    (note,) = sampling_notes(asks, Sampling())
    assert "(do_sample, temperature 0.2, top_k 20)" in note
    assert sampling_notes(asks, Sampling(0.7)) == ()
    assert sampling_notes(GenerationRules(sampling={"top_p": 0.6}), Sampling()) == ()


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (Sampling(repetition_penalty=0), "--repetition-penalty 0 is not above 0"),
        (Sampling(repetition_penalty=float("nan")), "--repetition-penalty nan"),
        (Sampling(repetition_penalty=float("inf")), "--repetition-penalty inf"),
        (Sampling(repetition_penalty="1.1"), "--repetition-penalty '1.1' is not a number"),  # type: ignore[arg-type]
        (Sampling(allow_banned=1), "allow_banned = 1, expected True or False"),  # type: ignore[arg-type]
        (Sampling(no_repeat_ngram=-1), "--no-repeat-ngram -1 is negative"),
        (Sampling(no_repeat_ngram=1.5), "--no-repeat-ngram 1.5 is not a whole number"),  # type: ignore[arg-type]
    ],
)
def test_values_without_a_meaning_are_refused(sampling: Sampling, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        sampling.check()
    assert reason in refused.value.message


ROWS, PROMPT_TOKENS = 152_000, 4096
COSTLY = GenerationRules(
    repetition_penalty=1.1,
    no_repeat_ngram_size=3,
    bad_words_ids=tuple((i, i + 1, i + 2) for i in range(1000)),
    suppress_tokens=tuple(range(100, 200)),
)


@pytest.mark.parametrize(
    "rules",
    [GenerationRules(), GenerationRules(repetition_penalty=1.1), COSTLY],
    ids=["no rule", "penalty", "all"],
)
def test_a_token_costs_far_less_than_sorting_the_vocabulary(
    rules: GenerationRules, generator: np.random.Generator
) -> None:
    """At 152,000 rows, after 4096 different tokens. Machines differ, so the measure is one full
    sort in float64.
    """
    prompt = generator.permutation(ROWS)[:PROMPT_TOKENS].tolist()
    ours = Processors(rules, prompt, len(prompt), (2,), ROWS)
    logits: Array = generator.normal(0, 3, ROWS).astype(np.float32)
    choose = sampler(Sampling())
    seconds = best_seconds(lambda: ours.add(choose(ours.process(logits))), 20)
    print(f"{1000 * seconds:.3f} ms a token")
    plain = best_seconds(lambda: np.argsort(-logits.astype(np.float64), kind="stable"), 5)
    assert seconds < plain / 10
