"""The verb `edgevlm embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import Debug, Force, Json, Quiet, Threads, opened_console


def embed(
    context: typer.Context,
    engine: Annotated[Path, typer.Argument(help="An engine of a vision tower by itself.")],
    images: Annotated[
        Optional[list[Path]], typer.Argument(help="Image files, and folders of them.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .npz or .parquet.")
    ] = Path("features.npz"),
    input_file: Annotated[
        Optional[Path], typer.Option("--input", help="A list of files, one a line.")
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide each embedding by its length.")
    ] = False,
    batch: Annotated[
        Optional[int],
        typer.Option(help="Images that the engine sees at a time; default: what suits it."),
    ] = None,
    threads: Threads = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one embedding for each image; a killed run goes on when it is started again."""
    from edgevlm.engines.runtime import embed_files, feature_file, image_list

    console = opened_console(as_json, quiet, context, threads)
    feature_file.check_output(output, force=force)
    files = image_list.gather(images or [], input_file)
    with console.bar("images", len(files)) as done:
        result = embed_files.embed_files(
            engine, files, output, normalize=normalize, batch=batch, threads=threads, done=done
        )
    console.result(result, embed_files.lines(result))
