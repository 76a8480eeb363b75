"""The verb `edgevlm run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import (
    AllowBanned,
    Debug,
    ForceSeg,
    Input,
    Json,
    Literal,
    Masks,
    NoRepeatNgram,
    Output,
    Overlay,
    Quiet,
    RepetitionPenalty,
    Threads,
    Verify,
    opened_console,
)


def run(
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    prompt: Annotated[Optional[str], typer.Argument(help="The question.")] = None,
    image: Annotated[Optional[list[str]], typer.Option(help="An image file. Repeatable.")] = None,
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
    template: Annotated[
        str, typer.Option(help="auto, none (PROMPT is raw text with <image>) or a name.")
    ] = "auto",
    stop: Annotated[
        Optional[list[str]], typer.Option(help="End the answer before this text. Repeatable.")
    ] = None,
    literal: Literal = False,
    input_file: Input = None,
    output: Output = None,
    masks: Masks = None,
    overlay: Overlay = None,
    force_seg: ForceSeg = False,
    verify: Verify = False,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Ask an engine a question about images; the answer streams."""
    from edgevlm.engines.runtime import batch, request_file
    from edgevlm.engines.runtime.mask_files import Wanted
    from edgevlm.engines.runtime.sampling import Sampling
    from edgevlm.engines.runtime.session import Question, Session, notes_on_threads

    console = opened_console(as_json, quiet)
    for note in notes_on_threads(threads):
        console.note(note)
    penalties = (repetition_penalty, no_repeat_ngram, allow_banned)
    sampling = Sampling(temperature, top_k, top_p, seed, *penalties)
    given = Question(
        prompt or "", image or (), max_tokens, sampling, template, stop or (), literal=literal
    )
    wanted, many = Wanted(masks, overlay, force_seg), input_file is not None
    wanted.check(many=many)
    batch.check_output(output, many=many)
    requests = request_file.gather(given, input_file)
    with Session.open(engine, threads=threads, verify=verify) as session:
        wanted.check_engine(session)
        requests = [wanted.asked(request, session) for request in requests]
        if not many:
            batch.answer_one(session, requests[0].asked(), console, wanted)
        else:
            batch.answer_all(session, requests, console, output)
