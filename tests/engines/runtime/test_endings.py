"""Answers that end at a special token which no configuration calls the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.runtime.session import Answer, Question, Session
from edgevlm.toolkit.ops.vocabulary import Array
from tests.conftest import HERE
from tests.pipeline import engine_of

END = "<|im_end|>"
HELLO = Question("Hello", (), 8)
NUMBER = 3  # of the answer's token whose row in the head is swapped with the end's


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_of(HERE / "goldens/mlcd_llavanext_e2e", tmp_path_factory.mktemp("endings"))


@pytest.fixture
def session(engine: Path) -> Iterator[Session]:
    """The tiny MLCD, whose configuration names another token the end, as base models do."""
    with Session.open(engine, threads=1) as opened:
        eos = opened.tokenizer.id_of("<|endoftext|>")
        assert eos is not None
        prompts = replace(opened.model.prompts, eos=(eos,))
        opened.model = replace(opened.model, prompts=prompts)
        yield opened


@pytest.fixture
def swapped(session: Session, monkeypatch: pytest.MonkeyPatch) -> tuple[Session, Answer]:
    """The session, which now says END where it said another token, and its answer before that.

    With swapped columns of the logits it chooses END instead of that token, and the other way.
    """
    plain = session.answer(replace(HELLO, template="none"))
    end = session.tokenizer.id_of(END)
    assert end is not None and end not in plain.token_ids
    pair = [plain.token_ids[NUMBER], end]

    def swap(compute: Any) -> Any:
        def computed(*given: Any) -> Array:
            logits: Array = compute(*given).copy()
            logits[pair] = logits[pair[::-1]]
            return logits

        return computed

    monkeypatch.setattr(session, "prefill", swap(session.prefill))
    monkeypatch.setattr(session, "decode", swap(session.decode))
    return session, plain


def test_a_stop_text_that_is_a_special_token_ends_the_answer(
    swapped: tuple[Session, Answer],
) -> None:
    session, plain = swapped
    raw = replace(HELLO, template="none")
    before = plain.token_ids[:NUMBER]
    without = session.answer(raw)
    assert len(without.token_ids) == 8
    assert END not in without.text
    for stop in ([END], ["never", END], END):
        found = session.answer(replace(raw, stop=stop))
        assert found.token_ids == (*before, session.tokenizer.id_of(END))
        assert found.text == session.tokenizer.decode(before)
        assert found.finish_reason == "stop"
    other = session.answer(replace(raw, stop=["<|im_start|>"]))
    assert (other.token_ids, other.text) == (without.token_ids, without.text)


def test_the_end_marker_of_the_template_ends_the_answer(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are given here; the second of them is half a character."""
    end = session.tokenizer.id_of(END)
    said = session.answer(HELLO).token_ids[:2]
    assert end is not None and end not in said
    assert session.tokenizer.decode(said).endswith("\ufffd")
    following = {said[0]: said[1], said[1]: end, end: said[0]}
    rows: int = session.model.lm.config.vocab_size

    def peak(token: int) -> Array:
        return np.asarray(np.eye(1, rows, token, dtype=np.float32)[0])

    monkeypatch.setattr(session, "prefill", lambda *given: peak(said[0]))
    monkeypatch.setattr(session, "decode", lambda token, *given: peak(following[token]))
    found = session.answer(HELLO)
    assert found.token_ids == (*said, end)
    assert (found.text, found.finish_reason) == (session.tokenizer.decode(said), "stop")
    without = session.answer(replace(HELLO, template="none"))
    assert without.token_ids == (*said, end, *said, end, *said)


def test_the_stream_gives_the_same_text(swapped: tuple[Session, Answer]) -> None:
    session, plain = swapped
    reply = session.ask(replace(HELLO, template="none", stop=[END]))
    assert "".join(token.text for token in reply) == reply.answer.text
    assert reply.answer.text == session.tokenizer.decode(plain.token_ids[:NUMBER])
