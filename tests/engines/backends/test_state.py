"""The KV state as a value: slots share memory, and prompts side by side answer as each alone."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.backends.bindings import KEPT_DECODE, KEPT_OTHERS, Bindings
from edgevlm.engines.backends.state import State, check, zeros
from edgevlm.engines.runtime import session as sessions
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.text.prompts import PromptSequence
from edgevlm.toolkit.vlm.components import Port
from tests.conftest import HERE
from tests.pipeline import engine_of

CHECKPOINT = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"
CACHE = ("batch", 2, "context", 3)
INPUTS = (Port("ids", "int64", ("batch", "sequence")), Port("past.0.key", "float", CACHE))
OUTPUTS = (Port("present.0.key", "float", CACHE, updates="past.0.key"),)
LENGTHS, STEPS = (5, 17, 11), 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


def text_of(ids: list[int]) -> PromptSequence:
    return PromptSequence(np.asarray([ids], np.int64), np.full((1, len(ids)), -1, np.int64))


def prompts(session: Session) -> list[list[int]]:
    generator = np.random.default_rng(0)
    vocab = session.model.lm.config.vocab_size
    return [generator.integers(3, vocab, n).tolist() for n in LENGTHS]


def prefilled(session: Session, prompt: list[int], state: State) -> int:
    nothing = np.zeros((1, session.model.lm.config.hidden_size), np.float32)
    return int(session.prefill(text_of(prompt), nothing, state).argmax())


def alone(session: Session, prompt: list[int]) -> tuple[list[int], list[Any]]:
    """Tokens and logits of one prompt in a state of its own."""
    state = session.new_state()
    tokens, logits = [prefilled(session, prompt, state)], []
    for step in range(STEPS):
        logits.append(session.decode(tokens[-1], len(prompt) + step, state).copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_prompts_in_slots_answer_as_each_alone(target: str, work: Path) -> None:
    with Session.open(engine_of(CHECKPOINT, work, target=target)) as session:
        given = prompts(session)
        expected = [alone(session, prompt) for prompt in given]
        state = session.new_state(slots=4)
        for array in state.arrays.values():
            array[3] = 7.0  # a slot that nobody uses
        tokens = [[prefilled(session, p, state.slot(i))] for i, p in enumerate(given)]
        for step in range(STEPS):
            positions = [length + step for length in LENGTHS]
            logits = session.decode_batch([t[-1] for t in tokens], positions, state.slots(0, 3))
            for slot, (own, (_, exact)) in enumerate(zip(tokens, expected, strict=True)):
                np.testing.assert_allclose(logits[slot], exact[step], atol=1e-4)
                own.append(int(logits[slot].argmax()))
        assert tokens == [want for want, _ in expected]
        assert len({tuple(t) for t in tokens}) == 3
        assert all((array[3] == 7.0).all() for array in state.arrays.values())


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_any_range_of_slots_decodes(target: str, work: Path) -> None:
    with Session.open(engine_of(CHECKPOINT, work, target=target)) as session:
        given = prompts(session)
        expected = [alone(session, prompt)[0] for prompt in given]
        state = session.new_state(slots=3)
        first = [prefilled(session, p, state.slot(i)) for i, p in enumerate(given)]
        later = session.decode_batch(first[1:], list(LENGTHS[1:]), state.slots(1, 3))
        one = session.decode(first[0], LENGTHS[0], state.slot(0))
        found = [int(x.argmax()) for x in (one, *later)]
        assert found == [tokens[1] for tokens in expected]


def test_slots_share_memory_and_keep_count_of_where_they_are() -> None:
    state = zeros(INPUTS, OUTPUTS, context=5, slots=4)
    whole = state.arrays["past.0.key"]
    assert (list(state.arrays), whole.shape) == (["past.0.key"], (4, 2, 5, 3))
    assert whole.dtype == np.float32
    part = state.slots(1, 4).slot(1)
    part.arrays["past.0.key"][...] = 1
    assert [float(slot.sum()) for slot in whole] == [0, 0, 2 * 5 * 3, 0]
    assert part.arrays["past.0.key"].flags.c_contiguous
    assert (part.first, part.count, part.allocation) == (2, 1, state.allocation)
    for begin, end in ((-1, 1), (2, 2), (3, 5), (4, 5)):
        with pytest.raises(InputError, match="not among the 4"):
            state.slots(begin, end)


def test_a_binding_of_single_tokens_outlives_any_number_of_others() -> None:
    kept: Bindings[object] = Bindings()
    decode = kept.get("decode", object, decode=True)
    for length in range(50):
        kept.get(length, object, decode=False)
    assert kept.get("decode", object, decode=True) is decode
    assert len(kept) == 1 + KEPT_OTHERS
    for slots in range(50):
        kept.get(("slots", slots), object, decode=True)
    assert len(kept) == KEPT_DECODE + KEPT_OTHERS


def test_the_binding_used_longest_ago_goes_first() -> None:
    kept: Bindings[object] = Bindings()
    first = [kept.get(n, object, decode=False) for n in range(KEPT_OTHERS)]
    assert kept.get(0, object, decode=False) is first[0]  # used again: now 1 is the oldest
    kept.get("new", object, decode=False)
    assert kept.get(0, object, decode=False) is first[0]
    assert kept.get(1, object, decode=False) is not first[1]


def test_a_prompt_in_many_lengths_leaves_the_decode_binding(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.open(engine_of(CHECKPOINT, work)) as session:
        state, bound = session.new_state(), 0
        runner: Any = session._lm
        bind = runner._bind

        def counting(*given: Any) -> Any:
            nonlocal bound
            bound += 1
            return bind(*given)

        prefilled(session, [5, 6, 7], state)
        session.decode(9, 3, state)
        monkeypatch.setattr(runner, "_bind", counting)
        for length in range(2, 12):
            prefilled(session, list(range(3, 3 + length)), state)
        before = bound
        session.decode(9, 11, state)
        assert (before, bound) == (9, 9)  # of ten lengths one, 3, was bound before


def test_a_released_state_takes_its_bindings_along(work: Path) -> None:
    with Session.open(engine_of(CHECKPOINT, work)) as session:
        runner: Any = session._lm
        state: State | None = session.new_state(slots=2)
        assert state is not None
        prefilled(session, [5, 6, 7], state.slot(1))
        (bindings,) = runner._bindings.values()
        kept, array = weakref.ref(bindings), weakref.ref(state.arrays["past.0.key"])
        view: State | None = state.slot(0)
        del bindings, state
        gc.collect()
        assert kept() is not None  # a slot is left
        del view
        gc.collect()
        assert (kept(), array(), len(runner._bindings)) == (None, None, 0)


def test_a_component_with_a_state_needs_one_of_its_own_and_of_its_size(work: Path) -> None:
    for target in ("cpu", "reference"):
        with Session.open(engine_of(CHECKPOINT, work, target=target)) as session:
            lm, merger = session._lm, session._runners["merger"]
            inputs = {
                "ids": np.ones((1, 1), np.int64),
                "rows": np.full((1, 1), -1, np.int64),
                "features": np.zeros((1, session.model.lm.config.hidden_size), np.float32),
                "start": np.zeros(1, np.int64),
                "score": np.zeros((1, 1), np.int64),
            }
            with pytest.raises(InputError, match="needs a state"):
                lm.run(inputs)
            with pytest.raises(InputError, match="needs a state"):
                lm.run(inputs, merger.new_state())
            with pytest.raises(InputError, match="1 rows for 2 slots"):
                lm.run(inputs, lm.new_state(2))
            assert merger.new_state().arrays == {}
            assert lm.run(inputs, lm.new_state())["logits"].shape[:2] == (1, 1)


def test_check_tells_what_is_wrong() -> None:
    state = zeros(INPUTS, OUTPUTS, context=8, slots=2)
    assert check(state, ["past.0.key"], 2, "lm") is state
    with pytest.raises(InputError, match="holds nothing"):
        zeros(INPUTS, OUTPUTS, context=8, slots=0)


def test_a_chunk_of_one_token_is_read_into_its_slot(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one token have a decode step's shape, without a score."""
    with Session.open(engine_of(CHECKPOINT, work)) as session:
        given = prompts(session)[0]
        expected = alone(session, given)[0]
        monkeypatch.setattr(sessions, "PREFILL_CHUNK", 1)
        assert alone(session, given)[0] == expected
