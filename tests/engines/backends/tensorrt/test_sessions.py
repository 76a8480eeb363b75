"""A whole session on engines of every release, token for token, and what it asks of the card.

The engine runs its lowered graph by ONNX Runtime in the memory of a stood-in card (trt_standin.py,
cuda_standin.py): addresses, shapes, graphs and copies are real, times and kernels are not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import api
from edgevlm.engines.backends.tensorrt import device
from edgevlm.engines.build.verify import verify
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import AccuracyError, TargetMismatch
from tests.engines.backends.tensorrt.conftest import GOLDEN, Built, Install
from tests.engines.backends.tensorrt.machine import OLDER, RELEASES
from tests.engines.backends.tensorrt.trt_standin import ARENA
from tests.pipeline import ask, engine_of, silent

CASE = json.loads((GOLDEN / "case.json").read_text())
QUESTION = Question(CASE["prompt"], [GOLDEN / "image.png"], 24, template="none")


def expected() -> list[int]:
    found: list[int] = np.load(GOLDEN / "outputs.npz")["greedy_ids"].tolist()
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_a_session_answers_token_for_token(release: str, built: Built, install: Install) -> None:
    engine, machine = built(release), install(release)
    log = machine.world.log
    with Session.open(engine) as session:
        opened = len(log)
        first = session.answer(QUESTION)
        assert list(first.token_ids) == expected()
        again = len(log)
        assert session.answer(QUESTION).token_ids == first.token_ids

    addresses = [e[1:] for e in log[opened:] if e[0].endswith(".set_tensor_address")]
    past = {address for name, address in addresses if name == "past.0.key"}
    present = {address for name, address in addresses if name == "present.0.key"}
    older = release in OLDER
    assert past == present
    assert len(past) == (2 if older else 1)  # two buffers that change places, or one for ever

    steps = len(first.token_ids) - 1
    graphs = 2 if older else 1
    names = [entry[0] for entry in log[opened:again]]
    assert names.count("graph") == graphs  # captured once for each pair of addresses
    assert names.count("launch") == steps - graphs  # each after one warm run
    later = [entry[0] for entry in log[again:]]
    assert later.count("graph") == 0
    assert later.count("launch") == steps  # the state, its memory and its graphs are used again
    assert not any(name.startswith("IExecutionContext.execute") for name in later[-20:])

    asked = [e[1] for e in log if e[0] == "IExecutionContext.set_device_memory"]
    sizes = [e[2] for e in log if e[0] == "IExecutionContext.set_device_memory"]
    assert len(set(asked)) == 1  # one arena for all components
    assert min(sizes) >= max(ARENA["lm"], ARENA["merger"], ARENA["encoder"])
    assert machine.world.live == 0
    assert machine.world.host == {}
    assert machine.world.streams == {}
    assert machine.world.graphs == 0


@pytest.mark.parametrize("release", ["10.3.0", "11.4.0.106", "rtx-1.7.1.116"])
def test_the_order_of_calls(release: str, built: Built, install: Install) -> None:
    engine, machine = built(release), install(release)
    log = machine.world.log
    with Session.open(engine) as session:
        names = machine.world.names()
        assert names.count("Runtime.deserialize_cuda_engine") == 3
        assert "IExecutionContext.execute_async_v3" not in names
        state = session.new_state()
        ids = np.asarray([[3, 4, 5]], np.int64)
        inputs: dict[str, Any] = {
            "ids": ids,
            "rows": np.full_like(ids, -1),
            "features": np.zeros((1, session.model.lm.config.hidden_size), np.float32),
            "start": np.zeros(1, np.int64),
            "score": np.full((1, 1), 2),
        }
        lm = session._runners["lm"]
        log.clear()
        assert lm.run(inputs, state)["logits"].shape == (1, 1, session.model.lm.config.vocab_size)
        assert _told(log) == [
            "ICudaEngine.create_execution_context",
            "IExecutionContext.set_optimization_profile_async",
            "IExecutionContext.set_input_shape",
            "IExecutionContext.infer_shapes",
            "IExecutionContext.get_tensor_shape",
            "IExecutionContext.set_tensor_address",
            "IExecutionContext.set_device_memory",
            "copy in",
            "IExecutionContext.execute_async_v3",
            "copy out",
        ]
        assert _profile(log) == ("IExecutionContext.set_optimization_profile_async", 0)
        log.clear()
        session.decode(7, 3, state)
        assert _profile(log) == ("IExecutionContext.set_optimization_profile_async", 1)
        for step in range(5):
            log.clear()
            session.decode(7, 4 + step, state)
        assert [entry[0] for entry in log] == ["launch"]


def _told(log: list[tuple[Any, ...]]) -> list[str]:
    """What was asked, in order, without memory and without repetitions."""
    told = ("copy", "launch", "IExecutionContext.", "ICudaEngine.create_execution_context")
    names = [entry[0] for entry in log if entry[0].startswith(told)]
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


def _profile(log: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    name = "IExecutionContext.set_optimization_profile_async"
    return next(entry[:2] for entry in log if entry[0] == name)


@pytest.mark.parametrize("release", ["10.3.0", "10.16.1.11"])
def test_replies_interleave(release: str, built: Built, install: Install) -> None:
    engine, _ = built(release), install(release)
    with Session.open(engine) as session:
        replies = [session.ask(QUESTION) for _ in range(3)]
        tokens: list[list[int]] = [[] for _ in replies]
        for step in zip(*replies, strict=True):
            for own, token in zip(tokens, step, strict=True):
                own.append(token.id)
        assert tokens == [expected()] * 3


@pytest.mark.parametrize("release", ["10.13.3.9", "rtx-1.7.1.116"])
def test_features_stay_on_the_card(release: str, built: Built, install: Install) -> None:
    engine, machine = built(release), install(release)
    with Session.open(engine) as session:
        log = machine.world.log
        log.clear()
        tokens = iter(session.ask(QUESTION))
        next(tokens)
        names = machine.world.names()
        # pixels in, the prompt's numbers in, its logits out: no features in between
        assert (names.count("copy in"), names.count("copy out")) == (2, 1)
        assert names.count("IExecutionContext.execute_async_v3") == 3
        places = [e[1:] for e in log if e[0] == "IExecutionContext.set_tensor_address"]
        made = [address for name, address in places if name == "features"]
        assert made[0] == made[1]  # what the merger wrote is what the language model reads
        tokens.close()  # type: ignore[attr-defined]


def test_two_images_are_joined_on_the_card(built: Built, install: Install) -> None:
    engine, machine = built("11.4.0.106"), install("11.4.0.106")
    prompt, images = CASE["prompt_two_images"], [GOLDEN / "image.png", GOLDEN / "image.png"]
    with Session.open(engine) as session:
        machine.world.log.clear()
        answer = session.answer(Question(prompt, images, 8, template="none"))
    assert machine.world.names().count("copy") == 2  # both on the card
    cpu = engine_of(GOLDEN / "llava-v1.5-tiny", engine.parent / "cpu-work")
    assert answer.token_ids == ask(cpu, prompt, images, 8).token_ids


def test_slots_decode_as_on_the_processor(built: Built, install: Install) -> None:
    """Before 10.15 each slot has its own buffer of the two: after prompts of different lengths."""
    for release in ("10.3.0", "11.4.0.106"):
        engine, _ = built(release), install(release)
        with Session.open(engine) as session:
            generator = np.random.default_rng(0)
            lengths = (3, 9, 300)  # the last one is read in two pieces
            prompts = [generator.integers(3, 900, n) for n in lengths]
            alone = [_tokens(session, prompt, session.new_state()) for prompt in prompts]
            state = session.new_state(slots=4)
            now = [_prefilled(session, p, state.slot(i)) for i, p in enumerate(prompts)]
            found = [[token] for token in now]
            for step in range(3):
                positions = [length + step for length in lengths]
                rows = session.decode_batch(now, positions, state.slots(0, 3))
                now = [int(row.argmax()) for row in rows]
                for own, token in zip(found, now, strict=True):
                    own.append(token)
        assert found == alone


def _prefilled(session: Session, ids: Any, state: Any) -> int:
    from tests.engines.backends.test_state import text_of

    nothing = np.zeros((1, session.model.lm.config.hidden_size), np.float32)
    return int(session.prefill(text_of(ids.tolist()), nothing, state).argmax())


def _tokens(session: Session, ids: Any, state: Any) -> list[int]:
    tokens = [_prefilled(session, ids, state)]
    for step in range(3):
        tokens.append(int(session.decode(tokens[-1], len(ids) + step, state).argmax()))
    return tokens


def test_an_engine_built_without_its_card_is_verified_on_it(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install("rtx-1.7.1.116")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(device, "architecture", lambda number=0: None)
        bundle, engine = tmp_path / "bundle", tmp_path / "engine"
        api.export_bundle(GOLDEN / "llava-v1.5-tiny", bundle, dtype="fp16")
        assert not api.build_engine(bundle, engine, target="tensorrt-rtx@1.7/sm_80+sm_89").verified
        with pytest.raises(TargetMismatch):
            Session.open(engine)
    with pytest.raises(AccuracyError, match="never compared"):
        Session.open(engine)
    made = verify(engine, silent)
    assert made.verified
    assert 1e-5 < max(made.build.kernel_differences.values()) < 5e-3  # of fp16
    with Session.open(engine) as session:
        assert list(session.answer(QUESTION).token_ids) == expected()
    assert machine.world.live == 0
