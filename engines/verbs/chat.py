"""The verb `edgevlm chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import (
    Debug,
    Drawing,
    Json,
    LongestAnswer,
    Penalties,
    Quiet,
    Stop,
    Threads,
    grouped,
    opened_console,
)


@grouped
def chat(
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    image: Annotated[
        Optional[list[str]], typer.Option(help="An image for the first turn. Repeatable.")
    ] = None,
    max_tokens: LongestAnswer = 512,
    *,
    drawing: Drawing,
    penalties: Penalties,
    template: Annotated[str, typer.Option(help="auto, or a template's name.")] = "auto",
    stop: Stop = None,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Guess tokens from the text so far.")
    ] = False,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk with an engine: several turns, images by path; /help lists the commands."""
    from edgevlm.engines.runtime.sampling import Sampling
    from edgevlm.engines.serving.chat import chat
    from edgevlm.engines.serving.conversation import Settings

    sampling = Sampling(**drawing._asdict(), **penalties._asdict())
    settings = Settings(max_tokens, sampling, template, stop or ())
    console = opened_console(as_json, quiet, threads=threads)
    chat(engine, settings, image or [], console, threads=threads, speculate=speculate)
