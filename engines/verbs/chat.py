"""The verb `edgevlm chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import (
    AllowBanned,
    Debug,
    Json,
    NoRepeatNgram,
    Quiet,
    RepetitionPenalty,
    Threads,
    opened_console,
)


def chat(
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    image: Annotated[
        Optional[list[str]], typer.Option(help="An image for the first turn. Repeatable.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens of this total probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 is off.")] = 0,
    seed: Annotated[Optional[int], typer.Option(help="Makes sampling repeatable.")] = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram: NoRepeatNgram = None,
    allow_banned: AllowBanned = False,
    template: Annotated[str, typer.Option(help="auto, or a template's name.")] = "auto",
    stop: Annotated[
        Optional[list[str]], typer.Option(help="End answers before this text. Repeatable.")
    ] = None,
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

    penalties = (repetition_penalty, no_repeat_ngram, allow_banned)
    sampling = Sampling(temperature, top_k, top_p, seed, *penalties)
    settings = Settings(max_tokens, sampling, template, stop or ())
    console = opened_console(as_json, quiet)
    chat(engine, settings, image or [], console, threads=threads, speculate=speculate)
