"""What the verb `chat` does: lines from a person or a pipe, answers as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgevlm.engines.runtime.session import Session
from edgevlm.engines.serving.conversation import Conversation, Settings, with_images
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.toolkit.errors import InputError, ToolkitError
from edgevlm.toolkit.terminal.console import Console

_COMMANDS = {
    "/image FILE": "show an image with the next question; several may be given",
    "/reset": "forget the conversation and its images",
    "/help": "list these commands",
    "/exit": "end, as Ctrl-D does",
}
_HELP = [f"{name:12}  {text}" for name, text in _COMMANDS.items()]
_WORDS = ("exit", "reset")  # commands by themselves in MLCD-Embodied's own script
_DAY_S = 86400.0


def chat(
    engine: Path,
    settings: Settings,
    images: list[str],
    console: Console,
    *,
    threads: int = 0,
    speculate: bool = False,
) -> None:
    """Talk until the input ends. With --json the whole conversation is printed at the end.

    Raises ToolkitError for what is wrong from the start; a turn that fails is told, and the
    conversation goes on.
    """
    settings.sampling.check()
    limits = Limits(slots=1, queue=1, request_s=_DAY_S)
    with Session.open(engine, threads=threads, replies=1) as session:
        scheduler = Scheduler(session, limits, speculate=speculate)
        try:
            conversation = Conversation(scheduler, settings)
            with_images(conversation, images)
            said = _talk(conversation, console)
        finally:
            scheduler.close()
    if console.as_json:
        console.result({"turns": said}, ())


def _talk(conversation: Conversation, console: Console) -> list[dict[str, Any]]:
    """Every line until the end; what was said, turns that were dropped later too."""
    said: list[dict[str, Any]] = []
    console.note("/help lists the commands, /exit ends")
    for line in _lines():
        word = _command(conversation, line)
        if word == "exit":
            break
        try:
            if word is not None:
                _do(conversation, word, line, console)
            elif line.strip():
                said.append(_turn(conversation, line, console))
        except ToolkitError as odd:
            print("error:", odd.message, file=sys.stderr)
            if odd.hint:
                print("hint:", odd.hint, file=sys.stderr)
    return said


def _command(conversation: Conversation, line: str) -> str | None:
    """The command that a line is, without its slash."""
    word = line.split(maxsplit=1)[0] if line.strip() else ""
    if word.startswith("/"):
        return word[1:]
    if conversation.template == "mlcd_chat" and line.lower() in _WORDS:
        return line.lower()
    return None


def _do(conversation: Conversation, word: str, line: str, console: Console) -> None:
    rest = line.partition(" ")[2].strip()
    if word == "help":
        print("\n".join(_HELP), file=sys.stderr)
    elif word == "reset":
        conversation.reset()
        console.note("the conversation is forgotten")
    elif word == "image" and rest:
        with_images(conversation, [rest])
        console.note(f"{rest} comes with the next question")
    else:
        raise InputError(f"there is no command {line.strip()!r:.80}", hint="/help lists them")


def _turn(conversation: Conversation, line: str, console: Console) -> dict[str, Any]:
    images = [str(path) for path in conversation.images]
    before = len(conversation.turns)
    pieces = conversation.ask(line)
    dropped = False
    try:
        for piece in pieces:
            if conversation.dropped and not dropped:
                dropped = True
                console.note(
                    f"the context is full: the oldest {conversation.dropped} of {before} turns are "
                    "dropped, with their images"
                )
            console.stream(piece)
    except KeyboardInterrupt:
        console.note("stopped")
    finally:
        pieces.close()  # type: ignore[attr-defined]
    console.stream("\n")
    turn = conversation.turns[-1]
    found: dict[str, Any] = {"prompt": line, "images": images, "text": turn.answer}
    if conversation.last is not None:
        answer = conversation.last
        for note in answer.notes:
            console.note(note)
        kept = ("prompt_tokens", "image_tokens", "finish_reason", "timings_ms")
        found |= {name: asdict(answer)[name] for name in kept}
    return found | {"dropped_turns": conversation.dropped}


def _lines() -> Iterator[str]:
    """Lines that a person types, with editing and history; or those of a pipe."""
    read = _editor() if sys.stdin.isatty() else _plain
    while True:
        try:
            yield read()
        except EOFError:
            return
        except KeyboardInterrupt:  # clears the line, as in a shell
            continue


def _plain() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _editor() -> Callable[[], str]:
    """prompt_toolkit where it is installed, input() elsewhere."""
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return lambda: input("> ")
    session: PromptSession[str] = PromptSession(completer=_completer(), complete_while_typing=False)
    return lambda: session.prompt("> ")


def _completer() -> Any:
    """Completes commands, and paths behind /image."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, event: Any) -> Iterator[Completion]:
            text = document.text_before_cursor
            if text.startswith("/image "):
                yield from paths.get_completions(Document(text.removeprefix("/image ")), event)
            elif text.startswith("/"):
                names = [name.removesuffix("FILE") for name in _COMMANDS]
                found = [name for name in names if name.startswith(text)]
                yield from (Completion(name, -len(text)) for name in found)

    return Commands()
