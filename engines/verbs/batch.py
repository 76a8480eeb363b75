"""The verb `edgevlm batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import (
    Debug,
    Drawing,
    Json,
    Literal,
    LongestAnswer,
    Quiet,
    Stop,
    Threads,
    grouped,
    opened_console,
)


@grouped
def batch(
    context: typer.Context,
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    source: Annotated[
        Path, typer.Argument(help="A folder of images, a list of them, or a .jsonl of requests.")
    ],
    out: Annotated[Path, typer.Argument(help="The job's folder; one that was begun goes on.")],
    prompt: Annotated[
        str, typer.Option(help="The question about each image of a folder or a list.")
    ] = "",
    max_tokens: LongestAnswer = 512,
    *,
    drawing: Drawing,
    stop: Stop = None,
    literal: Literal = False,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide each embedding by its length.")
    ] = False,
    form: Annotated[str, typer.Option("--format", help="jsonl or parquet.")] = "jsonl",
    part: Annotated[int, typer.Option(help="Requests of a part.")] = 256,
    slots: Annotated[int, typer.Option(help="Answers at a time of each process.")] = 8,
    strict: Annotated[
        bool, typer.Option("--strict", help="Compute every answer as `run` does: one by one.")
    ] = False,
    ray: Annotated[
        Optional[str], typer.Option(help="Spread over Ray: local, auto or a cluster's address.")
    ] = None,
    actors: Annotated[
        Optional[int], typer.Option(help="Processes on Ray; default: one on each machine.")
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer or embed a large set in parts; a killed job goes on when it is started again."""
    from edgevlm.engines.runtime.question import Question
    from edgevlm.engines.runtime.sampling import Sampling
    from edgevlm.engines.serving import batch_job
    from edgevlm.engines.serving.batch_parts import Settings

    console = opened_console(as_json, quiet, context)
    sampling = Sampling(**drawing._asdict())
    given = Question(prompt, (), max_tokens, sampling, stop=stop or (), literal=literal)
    settings = Settings(form, part, normalize, slots, strict, literal, sampling)
    cluster = batch_job.cluster_of(ray, actors)
    result = batch_job.answer(
        engine, source, out, given, settings, threads=threads, cluster=cluster, console=console
    )
    console.result(result, batch_job.lines(result))
