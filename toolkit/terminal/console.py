"""What a user sees: progress on stderr, results on stdout, one JSON object with --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgevlm.toolkit.errors import printable
from edgevlm.toolkit.strict import to_json
from edgevlm.toolkit.terminal import program, streams

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.status import Status

_EVERY = 10.0  # seconds between two lines of a bar that is no terminal's


@dataclass
class Console:
    """Where messages go. quiet: no progress; as_json: stdout carries one JSON object only.

    On a terminal the running step has a spinner, which `close` removes.
    """

    quiet: bool = False
    as_json: bool = False
    _started: float = field(default_factory=time.perf_counter)
    _working: Status | None = None
    _line: str = ""

    def step(self, message: str) -> None:
        """Begin a step: one line of progress with the seconds since the start."""
        if self.quiet:
            return
        self.close()
        self._line = f"{time.perf_counter() - self._started:7.1f} s  {message}"
        if sys.stderr.isatty():
            self._working = _spinner(self._line)
        else:
            print(self._line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the running step; its line stays."""
        if self._working is not None:
            self._working.stop()
            self._working = None
            print(self._line, file=sys.stderr, flush=True)

    def note(self, message: str) -> None:
        """Something the user should know that is not progress."""
        self.close()
        if not self.quiet:
            print(f"note: {printable(message)}", file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress over many things: a bar on a terminal, else a line now and then.

        Yields a function that is told how many are done, those of earlier runs too.
        """
        if self.quiet:
            yield lambda done: None
            return
        self.close()
        if sys.stderr.isatty():
            with _progress() as progress:
                task = progress.add_task(what, total=total)
                yield lambda done: progress.update(task, completed=done)
            return
        said = time.perf_counter() - _EVERY

        def tell(done: int) -> None:
            nonlocal said
            if time.perf_counter() - said >= _EVERY or done == total:
                said = time.perf_counter()
                print(f"{said - self._started:7.1f} s  {what}: {done} of {total}", file=sys.stderr)

        yield tell

    def result(self, data: Any, lines: Sequence[str], following: str = "") -> None:
        """The verb's result: `data` as JSON, or `lines` for people; following: the next command."""
        self.close()
        with streams.written():
            if self.as_json:
                streams.write_ascii(to_json(data))
                return
            for line in lines:
                shown = line if isinstance(line, Drawn) else printable(line, keep="\n\t")
                print(shown, flush=True)
            if following and not self.quiet:
                print(f"next: {program.as_typed(following)}")

    def stream(self, text: str) -> None:
        """A piece of an answer, printed at once; of a model's control characters the escapes."""
        if not self.as_json:
            shown = printable(text, keep="\n\t") if sys.stdout.isatty() else text
            with streams.written():
                print(shown, end="", flush=True)


def _progress() -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), console=RichConsole(stderr=True))


def _spinner(line: str) -> Status:
    from rich.console import Console as RichConsole
    from rich.markup import escape

    working = RichConsole(stderr=True).status(escape(line))
    working.start()
    return working


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Aligned columns; numbers to the right. On a terminal rich draws it."""
    cells = [[printable(_cell(value)) for value in row] for row in rows]
    if sys.stdout.isatty():
        return [_rich_table(columns, cells)]
    widths = [max(len(r[i]) for r in [list(columns), *cells]) for i in range(len(columns))]
    right = [all(_numeric(row[i]) for row in rows) and bool(rows) for i in range(len(columns))]
    lines = []
    for row in [list(columns), *cells]:
        padded = [
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def _numeric(value: Any) -> bool:
    return isinstance(value, (int, float))


class Drawn(str):
    """Text that rich drew, with its colours: all of it may go to a terminal."""


def _rich_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Drawn:
    from io import StringIO

    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        drawn.add_column(name)
    for row in cells:
        drawn.add_row(*map(Text, row))  # text in brackets is no markup
    text = StringIO()
    RichConsole(file=text, force_terminal=True).print(drawn)
    return Drawn(text.getvalue().rstrip("\n"))


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KB"; powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def human_count(count: float) -> str:
    """1_234_000 -> "1.23 M"."""
    for unit in ("", " K", " M", " G", " T"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} P"
