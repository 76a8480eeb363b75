"""The verb `edgevlm chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import (
    AllowBanned,
    Debug,
    Json,
    LongestAnswer,
    NoRepeatNgram,
    Quiet,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    opened_console,
)


def chat(
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    image: Annotated[
        Optional[list[str]], typer.Option(help="An image for the first turn. Repeatable.")
    ] = None,
    max_tokens: LongestAnswer = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram: NoRepeatNgram = None,
    allow_banned: AllowBanned = False,
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

    penalties = (repetition_penalty, no_repeat_ngram, allow_banned)
    sampling = Sampling(temperature, top_k, top_p, seed, *penalties)
    settings = Settings(max_tokens, sampling, template, stop or ())
    console = opened_console(as_json, quiet, threads=threads)
    chat(engine, settings, image or [], console, threads=threads, speculate=speculate)
