"""The verb `edgevlm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import (
    Debug,
    Json,
    LongestAnswer,
    Quiet,
    Threads,
    opened_console,
)


def serve(
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        Optional[str],
        typer.Option(envvar="EDGEVLM_API_KEY", help="What clients must send as their key."),
    ] = None,
    name: Annotated[
        Optional[str], typer.Option(help="The model's name; default: the engine's folder.")
    ] = None,
    slots: Annotated[
        Optional[int],
        typer.Option(help="Answers at a time, 8; of a tower images, as many as suit it."),
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait for a slot.")] = 64,
    max_tokens: LongestAnswer = 2048,
    max_images: Annotated[int, typer.Option(help="Images of a request.")] = 16,
    max_image_bytes: Annotated[int, typer.Option(help="Bytes of an image's file.")] = 16 << 20,
    max_image_pixels: Annotated[int, typer.Option(help="Pixels of an image.")] = 25_000_000,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of a request.")] = 32 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds for a request, waiting too.")] = 600.0,
    receive_timeout: Annotated[
        float, typer.Option(help="Seconds until a request's head, and its body, are there.")
    ] = 30.0,
    grace: Annotated[
        float, typer.Option(help="Seconds for answers that have begun when it is stopped.")
    ] = 30.0,
    image_cache_mb: Annotated[
        int, typer.Option(help="Memory for encoded images, in units of 2^20 bytes.")
    ] = 256,
    strict: Annotated[
        bool, typer.Option("--strict", help="Compute every answer as `run` does: one by one.")
    ] = False,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Guess tokens from the text of a lone answer.")
    ] = False,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer over HTTP as OpenAI's API does, many at a time; a page at /."""
    from edgevlm.engines.serving.command import Serving, serve
    from edgevlm.engines.serving.limits import Limits

    limits = Limits(
        Limits.slots,
        queue,
        max_body_bytes,
        max_image_bytes,
        max_image_pixels,
        max_images,
        max_tokens,
        timeout,
        receive_timeout,
        image_cache_mb << 20,
    )
    serving = Serving(host, port, api_key, name, slots, grace, threads, strict, speculate)
    serve(engine, limits, serving, opened_console(as_json, quiet, threads=threads))
