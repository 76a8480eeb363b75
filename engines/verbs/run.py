"""The verb `edgevlm run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import (
    Debug,
    Drawing,
    ForceSeg,
    Input,
    Json,
    Literal,
    LongestAnswer,
    Masks,
    Output,
    Overlay,
    Penalties,
    Quiet,
    Stop,
    Threads,
    Verify,
    grouped,
    opened_console,
)


@grouped
def run(
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    prompt: Annotated[Optional[str], typer.Argument(help="The question.")] = None,
    image: Annotated[Optional[list[str]], typer.Option(help="An image file. Repeatable.")] = None,
    max_tokens: LongestAnswer = 512,
    *,
    drawing: Drawing,
    penalties: Penalties,
    template: Annotated[
        str, typer.Option(help="auto, none (PROMPT is raw text with <image>) or a name.")
    ] = "auto",
    stop: Stop = None,
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
    from edgevlm.engines.runtime.session import Question, Session

    console = opened_console(as_json, quiet, threads=threads)
    sampling = Sampling(**drawing._asdict(), **penalties._asdict())
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
