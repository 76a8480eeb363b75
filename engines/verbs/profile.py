"""The verb `edgevlm profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import Debug, Json, Quiet, Threads, opened_console


def profile(
    context: typer.Context,
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    image: Annotated[
        Optional[Path], typer.Option(help="An image file; default: a generated image.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens generated in each run.")] = 64,
    runs: Annotated[int, typer.Option(help="Timed runs.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before the timed ones.")] = 1,
    compare: Annotated[
        Optional[list[Path]], typer.Option(help="Another engine to measure too. Repeatable.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Show the N slowest layers.")] = 0,
    html: Annotated[Optional[Path], typer.Option(help="Write a self-contained report.")] = None,
    trace: Annotated[Optional[Path], typer.Option(help="Write a Chrome/Perfetto trace.")] = None,
    csv: Annotated[Optional[Path], typer.Option(help="Write all metrics, one a line.")] = None,
    markdown: Annotated[Optional[Path], typer.Option(help="Write tables for a comment.")] = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure an engine: every stage and layer, compared with the machine's limits."""
    from edgevlm.engines.profiling import profile, report, tower

    console = opened_console(as_json, quiet, context, threads)
    request = profile.ProfileRequest(
        image, prompt_tokens, max_tokens, runs, warmup, threads, layers=bool(layers or html)
    )
    files = report.Files(html, trace, csv, markdown)
    report.check_files(layers, files)
    measured = tower.profile_all if tower.is_tower(engine) else profile.profile_all
    profiles = measured([engine, *(compare or [])], request, console.step)
    report.write_files(profiles, files)
    console.result(*report.result(profiles, layers))
