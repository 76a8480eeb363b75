"""Several replies of one session: each gives what it gives alone, or is refused by name."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Answer, Question, Reply, Session, Token
from edgevlm.toolkit.errors import InputError, OutOfMemory
from tests.conftest import HERE
from tests.pipeline import engine_of

GOLDEN = HERE / "goldens/e2e_llava15"
QUESTIONS = (
    Question("What is in the image?", GOLDEN / "image.png", 16),
    Question("Tell me about cats and dogs, please", (), 16),
    Question("Why?", (), 9, Sampling(1.0, 20, 0.9, seed=5)),
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_of(GOLDEN / "llava-v1.5-tiny", tmp_path_factory.mktemp("replies"))


@pytest.fixture
def session(engine: Path) -> Iterator[Session]:
    with Session.open(engine, threads=1, replies=3) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(engine: Path) -> list[Answer]:
    """Each question in a session of its own."""
    found = []
    for question in QUESTIONS:
        with Session.open(engine, threads=1) as own:
            found.append(own.answer(question))
    return found


def begun(session: Session, question: Question = QUESTIONS[0]) -> tuple[Reply, Iterator[Token]]:
    """A reply of which one token is read."""
    reply = session.ask(question)
    tokens = iter(reply)
    next(tokens)
    return reply, tokens


def test_replies_read_in_turns_give_what_each_gives_alone(
    session: Session, alone: list[Answer]
) -> None:
    replies = [session.ask(question) for question in QUESTIONS]
    streams = [iter(reply) for reply in replies]
    left = list(streams)
    while left:
        left = [stream for stream in left if next(stream, None) is not None]
    found = [reply.answer for reply in replies]
    assert [a.token_ids for a in found] == [a.token_ids for a in alone]
    assert [a.text for a in found] == [a.text for a in alone]
    assert len({a.token_ids for a in found}) == 3


def test_threads_give_what_each_gives_alone(session: Session, alone: list[Answer]) -> None:
    wrong: list[Any] = []

    def work(number: int) -> None:
        for _ in range(8):
            found: Any
            try:
                found = session.answer(QUESTIONS[number]).token_ids
            except BaseException as refused:
                found = repr(refused)
            if found != alone[number].token_ids:
                wrong.append((number, found))

    threads = [Thread(target=work, args=(number,)) for number in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_reply_too_many_is_refused_and_finishing_one_makes_way(session: Session) -> None:
    held = [begun(session) for _ in range(3)]
    for _ in range(2):
        with pytest.raises(InputError, match="3 replies of this session are open") as refused:
            session.answer(QUESTIONS[1])
        assert "close it" in refused.value.hint
    for _ in held[0][1]:
        pass
    assert len(session.answer(QUESTIONS[1]).token_ids) == 16
    held[1][0].close()
    held[2][0].close()
    held[2][0].close()
    assert [len(begun(session)[0]._ids) for _ in range(5)] == [1] * 5


@pytest.mark.parametrize("way", ["dropped", "broken off", "in a circle", "with"])
def test_an_abandoned_reply_gives_its_state_back(
    way: str, session: Session, alone: list[Answer]
) -> None:
    for _ in range(4):
        if way == "with":
            with session.ask(QUESTIONS[0]) as reply:
                next(iter(reply))
        elif way == "broken off":
            for token in session.ask(QUESTIONS[0]):
                if token.ms > 0:
                    break
        else:
            reply, tokens = begun(session)
            if way == "in a circle":
                circle: list[Any] = [tokens]
                circle.append(circle)
                del circle
            del tokens
    assert session.answer(QUESTIONS[1]).token_ids == alone[1].token_ids


def test_states_are_used_again_and_made_only_when_needed(session: Session) -> None:
    for question in (*QUESTIONS, *QUESTIONS):
        session.answer(question)
    assert session.states._made == 1
    gc.collect()
    runner: Any = session._lm
    assert len(runner._bindings) == 1


def test_a_state_is_free_when_the_last_token_comes(session: Session) -> None:
    """Who stops reading at the last token has the answer, and holds nothing."""
    held = []
    for _ in range(5):
        reply = session.ask(QUESTIONS[1])
        tokens = iter(reply)
        for _ in range(16):
            next(tokens)
        held.append(tokens)
        assert len(reply.answer.token_ids) == 16


def test_a_reply_is_read_once(session: Session, alone: list[Answer]) -> None:
    reply = session.ask(QUESTIONS[0])
    first = [token.id for token in reply]
    with pytest.raises(InputError, match="was read") as refused:
        list(reply)
    assert "ask the session again" in refused.value.hint
    assert tuple(first) == reply.answer.token_ids == alone[0].token_ids
    reply, tokens = begun(session)
    with pytest.raises(InputError, match="is being read"):
        iter(reply)
    assert len(list(tokens)) == 15
    assert reply.answer.token_ids == alone[0].token_ids


def test_an_answer_comes_after_the_last_token(session: Session) -> None:
    reply = session.ask(QUESTIONS[0])
    with pytest.raises(InputError, match="not read to its last token"):
        _ = reply.answer
    tokens = iter(reply)
    for _ in range(3):
        next(tokens)
        with pytest.raises(InputError, match="not read to its last token"):
            _ = reply.answer
    reply.close()
    assert list(tokens) == []
    with pytest.raises(InputError, match="not read to its last token"):
        _ = reply.answer
    with pytest.raises(InputError, match="was closed"):
        iter(reply)


def test_a_reply_that_fails_gives_its_state_back(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(session, "decode", broken)
        for _ in range(5):
            with pytest.raises(RuntimeError, match="no more"):
                session.answer(QUESTIONS[1])
    assert len(session.answer(QUESTIONS[1]).token_ids) == 16


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("stop", [(), ("e",), ("\ufffd\ufffd\ufffd zz", "zz")])
def test_the_texts_of_the_tokens_are_the_text_and_every_token_is_real(
    question: Question, tokens: int, stop: tuple[str, ...], session: Session
) -> None:
    limited = Question(question.prompt, question.images, tokens, question.sampling, stop=stop)
    reply = session.ask(limited)
    read = list(reply)
    assert "".join(token.text for token in read) == reply.answer.text
    assert tuple(token.id for token in read) == reply.answer.token_ids
    assert min(token.id for token in read) >= 0
    assert len(read) <= tokens
    assert [token.ms for token in read] == sorted(token.ms for token in read)


def test_text_that_was_held_back_comes_with_the_last_token(session: Session) -> None:
    """A stop string that begins but does not end is text after all."""
    text = session.answer(QUESTIONS[1]).text
    reply = session.ask(Question(QUESTIONS[1].prompt, (), 16, stop=[text[-1] + "never"]))
    read = list(reply)
    assert len(read) == 16
    assert read[-1].text.endswith(text[-1])
    assert reply.answer.text == text
    assert reply.answer.finish_reason == "length"


def test_a_token_is_yielded_before_the_next_is_computed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    decode = session.decode

    def counting(*given: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(*given)

    monkeypatch.setattr(session, "decode", counting)
    counts = [decoded for _ in session.ask(QUESTIONS[1])]
    assert counts == list(range(16))


def test_a_further_state_must_fit_into_memory(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = memory.of_engine(session.engine).cache_bytes
    _, tokens = begun(session)
    monkeypatch.setattr(memory, "available_bytes", lambda: cache - 1)
    with pytest.raises(OutOfMemory, match="the KV cache of reply 2"):
        session.answer(QUESTIONS[1])
    monkeypatch.setattr(memory, "available_bytes", lambda: cache)
    assert len(session.answer(QUESTIONS[1]).token_ids) == 16
    assert len(list(tokens)) == 15
