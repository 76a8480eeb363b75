"""Talking with an engine: turns, images, commands, and what happens when the context is full."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgevlm import cli
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.conversation import Conversation, Settings
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.toolkit.errors import InputError, PromptTooLong
from tests.engines.serving.conftest import GOLDEN

IMAGE = GOLDEN / "image.png"


@pytest.fixture
def scheduler(session: Session) -> Iterator[Scheduler]:
    made = Scheduler(session, Limits(slots=1, queue=1))
    yield made
    made.close()


def said(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def test_turns_are_those_of_one_prompt_and_read_once(
    scheduler: Scheduler, session: Session
) -> None:
    conversation = Conversation(scheduler, Settings(8))
    conversation.add_image(IMAGE)
    first = said(conversation, "What is in the image?")
    assert first == session.answer(Question("What is in the image?", IMAGE, 8)).text
    second = said(conversation, "And what else?")
    asked = Question("And what else?", IMAGE, 8, history=["What is in the image?", first])
    assert second == session.answer(asked).text
    conversation.add_image(IMAGE)
    third = said(conversation, "Is this the same?")
    history = ["What is in the image?", first, "And what else?", second]
    asked = Question("Is this the same?", [IMAGE, IMAGE], 8, history=history, image_turns=[0, 4])
    assert third == session.answer(asked).text
    assert conversation.last is not None
    assert "encoder.clip" in conversation.last.timings_ms  # one of two is cut otherwise than alone
    assert scheduler.counts.reused_tokens >= 64
    conversation.reset()
    assert said(conversation, "Why?") == session.answer(Question("Why?", (), 8)).text


def test_the_oldest_turns_go_when_the_context_is_full(scheduler: Scheduler) -> None:
    conversation = Conversation(scheduler, Settings(4))
    long = "a b c d " * (scheduler.session.engine.context // 12)
    conversation.add_image(IMAGE)
    dropped = []
    for number in range(6):
        said(conversation, f"{number} {long}")
        dropped.append(conversation.dropped)
    assert dropped[0] == 0
    assert max(dropped) >= 1
    assert len(conversation.turns) == 6 - sum(dropped)
    assert conversation.turns[0].images == ()
    with pytest.raises(PromptTooLong):
        said(conversation, long * 3)
    assert len(conversation.turns) == 6 - sum(dropped)


def test_an_answer_that_is_broken_off_stays_as_far_as_it_was_read(scheduler: Scheduler) -> None:
    conversation = Conversation(scheduler, Settings(300))
    pieces = conversation.ask("Tell me everything")
    seen = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.turns[0].answer == seen
    assert said(conversation, "And then?") != ""


def test_the_role_that_a_model_writes_itself_is_left_out(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLCD-Embodied's script ends its prompt before the answer's role."""
    written = ["assis", "tant", "\n", "A ", "cat", "assistant\n", "."]
    conversation = Conversation(scheduler, Settings(7, template="mlcd_chat"))
    pushed = iter(written)
    monkeypatch.setattr(
        "edgevlm.engines.runtime.stopping.StoppingText.push", lambda self, token: next(pushed)
    )
    monkeypatch.setattr("edgevlm.engines.runtime.stopping.StoppingText.finish", lambda self: "")
    assert list(conversation.ask("What?")) == ["A ", "cat", "assistant\n", "."]
    assert conversation.turns[0].answer == "A cat."


def talk(lines: str, engine: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    cli.app(["chat", str(engine), "--max-tokens", "6", *options], standalone_mode=False)


def test_the_verb_reads_lines_and_knows_its_commands(
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(IMAGE, tmp_path / "a picture.png")
    lines = (
        f"/image {tmp_path}/a picture.png\nWhat is it?\n\nAnd now?\n/nonsense\n/image none.png\n"
    )
    talk(f"{lines}/reset\nWhy?\n/help\n/exit\nnever\n", engine, monkeypatch, "--json")
    out, err = capsys.readouterr()
    turns = json.loads(out)["turns"]
    assert [turn["prompt"] for turn in turns] == ["What is it?", "And now?", "Why?"]
    assert [len(turn["images"]) for turn in turns] == [1, 0, 0]
    assert [turn["image_tokens"] > 0 for turn in turns] == [True, True, False]
    assert "there is no command '/nonsense'" in err
    assert "none.png does not exist" in err
    assert "/image FILE" in err


def test_answers_stream_and_a_full_context_is_told(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Session.open(engine, threads=1) as session:
        long = "a b c d " * (session.engine.context // 12)
        expected = session.answer(Question("Why?", (), 6)).text
    talk("Why?\n" + f"{long}\n" * 6, engine, monkeypatch)
    out, err = capsys.readouterr()
    assert out.startswith(expected + "\n")
    assert "the context is full: the oldest" in err


def test_words_of_the_original_script(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevlm.engines.serving import chat

    own = Conversation(scheduler, Settings(template="mlcd_chat"))
    other = Conversation(scheduler, Settings())
    assert [chat._command(own, line) for line in ("Exit", "RESET", "exit now")] == [
        "exit",
        "reset",
        None,
    ]
    assert chat._command(other, "exit") is None


def test_commands_and_paths_are_completed(tmp_path: Path) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from edgevlm.engines.serving import chat

    (tmp_path / "photo.png").touch()

    def completed(line: str) -> list[str]:
        found = chat._completer().get_completions(Document(line), CompleteEvent())
        return [one.text for one in found]

    assert completed("/ima") == ["/image "]
    assert completed("/") == ["/image ", "/reset", "/help", "/exit"]
    assert completed(f"/image {tmp_path}/pho") == ["to.png"]
    assert completed("What is /ima") == []


def test_images_belong_to_turns_of_the_user(session: Session) -> None:
    history = ["One?", "Two."]
    for turns, says in (([1], "user's turns"), ([4], "user's turns"), ([0, 0], "for 1 images")):
        asked: Any = Question("And?", IMAGE, 4, history=history, image_turns=turns)
        with pytest.raises(InputError, match=says):
            session.answer(asked)
