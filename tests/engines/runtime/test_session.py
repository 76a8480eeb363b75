"""A session's life: what it opened is closed, whatever happens in between."""

from __future__ import annotations

import itertools
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from edgevlm.engines import manifest
from edgevlm.engines.backends import onnxruntime as backend
from edgevlm.engines.runtime import concurrency
from edgevlm.engines.runtime import session as sessions
from edgevlm.engines.runtime.concurrency import Turns
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.bundle.manifest import TOKENIZER
from edgevlm.toolkit.errors import BuildError, ConfigError, InputError
from tests.conftest import HERE
from tests.pipeline import engine_of

GOLDEN = HERE / "goldens/e2e_llava15"
QUESTION = Question("Why?", GOLDEN / "image.png", 4)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_of(GOLDEN / "llava-v1.5-tiny", tmp_path_factory.mktemp("session"))


class Counted:
    """Counts the runners of a backend that are open."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.opened = self.closed = 0
        real, calls = backend.open, itertools.count()

        def opening(*given: Any) -> Any:
            if next(calls) == fail_at:
                raise RuntimeError("cannot be opened")
            runner = real(*given)
            self.opened += 1
            close = runner.close

            def closing() -> None:
                self.closed += 1
                close()

            runner.close = closing  # type: ignore[method-assign]
            return runner

        patch.setattr(backend, "open", opening)


def test_a_session_closes_its_runners_once(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    with Session.open(engine) as session:
        session.answer(QUESTION)
        assert (counted.opened, counted.closed) == (3, 0)
    session.close()
    session.close()
    assert (counted.opened, counted.closed) == (3, 3)


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_opening_that_fails_closes_what_it_opened(
    fail_at: int, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch, fail_at)
    with pytest.raises(RuntimeError, match="cannot be opened"):
        Session.open(engine)
    assert counted.opened == counted.closed == 2  # of three components, all opened at a time


def test_a_broken_tokenizer_leaves_nothing_open(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    monkeypatch.setattr(manifest, "check", lambda folder, made: None)
    text = (engine / TOKENIZER).read_text()
    try:
        (engine / TOKENIZER).write_text("{")
        with pytest.raises(ConfigError, match="not a tokenizer file"):
            Session.open(engine)
    finally:
        (engine / TOKENIZER).write_text(text)
    assert (counted.opened, counted.closed) == (3, 3)


def test_one_runner_that_cannot_be_closed_keeps_no_other_open(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.open(engine)
    closed: list[str] = []

    def closing(name: str) -> None:
        closed.append(name)
        raise RuntimeError(name)

    for name, runner in session._runners.items():
        monkeypatch.setattr(runner, "close", lambda name=name: closing(name))
    with pytest.raises(RuntimeError):
        session.close()
    assert sorted(closed) == sorted(session._runners)


def test_a_closed_session_refuses_everything(engine: Path) -> None:
    session = Session.open(engine)
    reply = session.ask(QUESTION)
    tokens = iter(session.ask(QUESTION))
    next(tokens)
    state = session.new_state()
    session.close()
    nothing = np.zeros((1, 1), np.float32)
    for use in (
        lambda: session.ask(QUESTION),
        lambda: session.answer(QUESTION),
        lambda: list(reply),
        lambda: next(tokens),
        lambda: session.new_state(),
        lambda: session.decode(1, 1, state),
        lambda: session.decode_batch([1], [1], state),
        lambda: session.encode([], nothing),  # type: ignore[arg-type]
        lambda: session.layers(),
    ):
        with pytest.raises(InputError, match="the session is closed"):
            use()


@pytest.mark.parametrize("threads", [-1, -100])
def test_a_negative_number_of_threads_is_refused(threads: int, engine: Path) -> None:
    with pytest.raises(InputError, match="is negative"):
        Session.open(engine, threads=threads)


def test_threads_far_beyond_the_processors_are_refused(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "threads_here", lambda: 2)
    for threads in (9, 256, 5000):
        with pytest.raises(InputError, match=f"--threads {threads} is far beyond the 2"):
            Session.open(engine, threads=threads)
    with Session.open(engine, threads=8) as session:
        assert session.threads == 8
    with Session.open(engine) as session:
        assert session.threads == 2


def test_a_session_without_replies_is_refused(engine: Path) -> None:
    with pytest.raises(InputError, match="0 replies"):
        Session.open(engine, replies=0)


def test_turns_go_by_arrival() -> None:
    turns, order = Turns(), []
    threads = []

    def work(number: int) -> None:
        with turns:
            order.append(number)

    with turns:
        for number in range(5):
            thread = Thread(target=work, args=(number,))
            thread.start()
            while len(turns._waiting) <= number:
                pass
            threads.append(thread)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]
    with turns:
        pass


class Interrupted(BaseException):
    """What Ctrl-C raises while a thread waits."""


class InterruptedLock:
    """A lock whose second acquire, the one that waits for a turn, is interrupted."""

    def __init__(self) -> None:
        self._times = 0

    def acquire(self) -> bool:
        self._times += 1
        if self._times == 2:
            raise Interrupted
        return True


def test_who_gives_up_waiting_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    with turns, monkeypatch.context() as patch:
        patch.setattr(concurrency, "Lock", InterruptedLock)
        with pytest.raises(Interrupted), turns:
            pass
    with turns:
        assert not turns._waiting
    assert not turns._taken


def test_what_onnxruntime_raises_is_an_error_of_ours(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bound: Any) -> None:
        raise RuntimeError("Non-zero status code returned while running Loop node")

    with Session.open(engine) as session:
        monkeypatch.setattr(backend._Bound, "run", fails)
        with pytest.raises(BuildError, match="encoder.clip: ONNX Runtime failed: Non-zero") as odd:
            session.answer(QUESTION)
    assert "build it again" in odd.value.hint
