"""Several sequences of one state on a stood-in card: decoded in one call, copied and exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import api
from edgevlm.engines.backends.state import State
from edgevlm.engines.build import shapes
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.limits import Limits
from edgevlm.toolkit.errors import AccuracyError
from tests.engines.backends.tensorrt import trt_standin
from tests.engines.backends.tensorrt.conftest import GOLDEN, Built, Install
from tests.engines.backends.tensorrt.cuda_standin import World
from tests.engines.backends.tensorrt.machine import OLDER, RELEASES
from tests.engines.backends.test_state import text_of
from tests.engines.serving.asking import all_tokens, scheduling

LENGTHS = (3, 9, 300, 17)  # the third is read in two pieces, so that its buffer is the other one
STEPS = 4
OLD, NEW, RTX = "10.3.0", "11.4.0.106", "rtx-1.7.1.116"


def prompts(count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    lengths = (LENGTHS * count)[:count]
    return [generator.integers(3, 900, length).tolist() for length in lengths]


def prefilled(session: Session, ids: list[int], state: State) -> int:
    nothing = np.zeros((1, session.model.lm.config.hidden_size), np.float32)
    return int(session.prefill(text_of(ids), nothing, state).argmax())


def alone(session: Session, ids: list[int]) -> list[Any]:
    """Logits of the first tokens behind a prompt in a state of its own."""
    state = session.new_state()
    tokens, found = [prefilled(session, ids, state)], []
    for step in range(STEPS):
        found.append(session.decode(tokens[-1], len(ids) + step, state).copy())
        tokens.append(int(found[-1].argmax()))
    return found


def calls(world: World) -> int:
    """Runs of engines since the log was cleared."""
    names = world.names()
    recorded = names.count("graph")  # what is recorded is launched too
    return names.count("IExecutionContext.execute_async_v3") + names.count("launch") - recorded


@pytest.mark.parametrize("release", RELEASES)
def test_several_sequences_get_a_token_in_one_call(
    release: str, built: Built, install: Install
) -> None:
    engine, machine = built(release), install(release)
    with Session.open(engine) as session:
        given = prompts(4)
        expected = [alone(session, ids) for ids in given]
        state = session.new_state(5)
        now = [prefilled(session, ids, state.slot(slot)) for slot, ids in enumerate(given)]
        for step in range(STEPS):
            machine.world.log.clear()
            at = [len(ids) + step for ids in given]
            rows = session.decode_batch(now, at, state.slots(0, 4))
            assert calls(machine.world) == 1
            copies = machine.world.names().count("copy")  # from one buffer to the other
            layers = session.model.lm.config.num_layers
            assert copies == (2 * layers if release in OLDER and not step else 0)
            for row, own in zip(rows, expected, strict=True):
                np.testing.assert_allclose(row, own[step], atol=1e-4)
            now = [int(row.argmax()) for row in rows]
        # one of them goes on by itself, in whichever buffer it is
        last = session.decode(now[2], LENGTHS[2] + STEPS, state.slot(2))
        again = session.decode_batch(now, [n + STEPS for n in LENGTHS], state.slots(0, 4))
        np.testing.assert_allclose(again[2], last, atol=1e-4)
    assert machine.world.live == 0


def test_more_sequences_than_a_profile_takes(built: Built, install: Install) -> None:
    engine, machine = built(NEW), install(NEW)
    with Session.open(engine) as session:
        given = [ids[:20] for ids in prompts(shapes.TOGETHER + 3)]
        state = session.new_state(len(given))
        now = [prefilled(session, ids, state.slot(slot)) for slot, ids in enumerate(given)]
        machine.world.log.clear()
        rows = session.decode_batch(now, [len(ids) for ids in given], state)
        assert calls(machine.world) == 2
        for ids, row in zip(given, rows, strict=True):
            np.testing.assert_allclose(row, alone(session, ids)[0], atol=1e-4)


@pytest.mark.parametrize("release", [OLD, RTX])
def test_slots_are_copied_and_exchanged(release: str, built: Built, install: Install) -> None:
    engine, machine = built(release), install(release)
    with Session.open(engine) as session:
        first, second = prompts(3)[1:]  # their buffers differ where there are two
        expected = [alone(session, ids)[0] for ids in (first, second)]
        state = session.new_state(4)
        assert state.movable
        tokens = [prefilled(session, ids, state.slot(n)) for n, ids in enumerate((first, second))]
        state.exchange(0, 1, 300)
        state.copy(0, 3, 0, 300)
        placed = {0: 1, 1: 0, 3: 1}
        for slot, own in placed.items():
            at = len((first, second)[own])
            found = session.decode(tokens[own], at, state.slot(slot))
            np.testing.assert_allclose(found, expected[own], atol=1e-4)
        part = state.slots(1, 3)  # what is counted from a part is the same memory
        part.exchange(0, 1, 300)
        found = session.decode(tokens[0], len(first), state.slot(2))
        np.testing.assert_allclose(found, expected[0], atol=1e-4)
    assert machine.world.live == 0


QUESTIONS = (
    Question("What is in the image?", GOLDEN / "image.png", 9),
    Question("Tell me about cats and dogs, please", (), 12),
    Question("Why?", (), 5),
    Question("And a longer one about a great many things that nobody has asked for", (), 14),
    Question("And a longer one about a great many things that nobody has seen", (), 3),
)


@pytest.mark.parametrize("release", [OLD, NEW])
def test_a_server_decodes_all_answers_in_one_call(
    release: str, built: Built, install: Install
) -> None:
    engine, machine = built(release), install(release)
    with Session.open(engine, replies=1) as session:
        own = [session.answer(question).token_ids for question in QUESTIONS]
        with scheduling(session, Limits(slots=3, queue=50)) as scheduler:
            assert scheduler.slots.movable
            machine.world.log.clear()
            assert all_tokens(scheduler, QUESTIONS) == own
            made, counts = calls(machine.world), scheduler.counts
            assert counts.stepped > 1.5 * counts.steps
            prompts_and_images = 3 * len(QUESTIONS)
            assert made <= counts.steps + prompts_and_images
            assert all_tokens(scheduler, QUESTIONS[::-1]) == own[::-1]
            assert counts.reused_tokens > 0
    assert machine.world.live == 0


def test_a_wrong_kernel_for_several_sequences_is_found(
    built: Built, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, machine = bundle_of(built), install(NEW)
    run = trt_standin.ICudaEngine._run

    def wrong(self: Any, inputs: dict[str, Any]) -> Any:
        found = run(self, inputs)
        if "ids" in inputs and len(inputs["ids"]) > 1:
            found["logits"] = found["logits"] * np.float32(1.01)
        return found

    monkeypatch.setattr(trt_standin.ICudaEngine, "_run", wrong)
    with pytest.raises(AccuracyError, match="lm differs from the reference by"):
        api.build_engine(bundle, tmp_path / "engine", target=str(machine.target))


def bundle_of(built: Built) -> Path:
    """That which the engines are built from."""
    return built(NEW).parent / "bundle"


def test_a_large_plan_is_not_cut_into_pieces(
    built: Built, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As graphs of ONNX Runtime are, whose weights need not be held at once."""
    bundle, machine = bundle_of(built), install(NEW)
    monkeypatch.setattr(memory, "WHOLE_BYTES", 1)
    assert api.build_engine(bundle, tmp_path / "engine", target=str(machine.target)).verified
