"""A profile for people and tools: text, and files in several formats."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.engines.profiling import forms, tables
from edgevlm.engines.profiling.forms import Shown
from edgevlm.engines.profiling.page import HEAD, as_html
from edgevlm.toolkit.errors import InputError, OutputError
from edgevlm.toolkit.strict import to_plain
from edgevlm.toolkit.terminal.console import table


@dataclass(frozen=True)
class Files:
    """Where a report is written; None for what was not asked for."""

    html: Path | None = None
    trace: Path | None = None
    csv: Path | None = None
    markdown: Path | None = None


def check_files(layers: int, files: Files) -> None:
    """Raise before anything is measured if the report could not be shown or written.

    A file that exists is replaced only if it is such a report itself.
    """
    if layers < 0:
        raise InputError(f"--layers {layers} is negative", hint="0 shows none")
    begins = {
        files.html: HEAD,
        files.trace: tables.TRACE_BEGINS,
        files.csv: tables.CSV_BEGINS,
        files.markdown: tables.MARKDOWN_BEGINS,
    }
    for file, begin in begins.items():
        if file is None:
            continue
        if file.is_file() and not _begins(file, begin):
            raise OutputError(
                f"{file} exists and is no such report of ours; it is left alone",
                hint="name another file, or remove it yourself",
            )
        odd = file.exists() and not file.is_file()
        if odd or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise OutputError(f"{file} cannot be written", hint="name a file in a folder of yours")


def _begins(file: Path, begin: str) -> bool:
    """Whether a file is empty or begins as ours do."""
    try:
        with file.open("rb") as opened:
            found = opened.read(len(begin))
    except OSError:
        return False
    return found in (b"", begin.encode())


def write_files(profiles: Sequence[Shown], files: Files) -> None:
    """Write the files that have a path. Raises OutputError if one cannot be written."""
    texts: dict[Path | None, Callable[[], str]] = {
        files.html: lambda: as_html(profiles),
        files.trace: lambda: tables.trace(profiles[0]),
        files.csv: lambda: tables.as_csv(profiles),
        files.markdown: lambda: tables.as_markdown(profiles),
    }
    try:
        for path, text in texts.items():
            if path is not None:
                path.write_text(text(), encoding="utf-8")
    except OSError as refused:
        raise OutputError(f"{refused.filename} cannot be written: {refused.strerror}") from None


def result(profiles: Sequence[Shown], layers: int) -> tuple[Any, list[str]]:
    """Data and lines of `edgevlm profile`; `compared` holds engines beyond the first."""
    data = to_plain(profiles[0])
    if len(profiles) > 1:
        data["compared"] = [to_plain(p) for p in profiles[1:]]
    text = [line for p in profiles for line in [p.engine, *lines(p, layers), ""]]
    together = table(tables.columns(profiles), tables.compared(profiles))
    return data, text + (together if len(profiles) > 1 else [])


def lines(p: Shown, layers: int) -> list[str]:
    """The profile as text: stages with their floor, then totals, then the slowest layers."""
    form = forms.of(p)
    reached = {bound.stage: bound for bound in p.roofline.stages}
    rows = []
    for stage, spread in p.stages.items():
        bound = reached.get(stage)
        floor = ("", "")
        if bound:
            floor = (f"{bound.floor_ms:.3g}", f"{bound.reached:.0%} ({bound.limited_by})")
        share = form.share(stage, spread.p50_ms, p)
        rows.append((stage, spread.p50_ms, spread.p90_ms, spread.p99_ms, *share, *floor))
    columns = ("stage", "p50 ms", "p90 ms", "p99 ms", *form.shares, "floor ms", "reached")
    text = [*table(columns, rows), "", *forms.totals(p)]
    if layers and p.layers:
        top = [(s.component, s.name, s.op, s.calls, s.ms) for s in p.layers[:layers]]
        text += ["", *table(("component", "layer", "op", "calls", "ms"), top)]
    return text
