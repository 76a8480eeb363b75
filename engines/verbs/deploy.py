"""The verb `edgevlm deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import Debug, Json, Quiet, Threads, opened_console


def deploy(
    kind: Annotated[str, typer.Argument(help="ray.")],
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    name: Annotated[
        Optional[str], typer.Option(help="The model's name; default: the engine's folder.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers at a time of one replica.")] = 8,
    replicas: Annotated[int, typer.Option(help="Replicas at most.")] = 4,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what another serving system needs to run an engine: Ray Serve."""
    from edgevlm.engines.serving.deploy import Deployment, deploy

    console = opened_console(as_json, quiet)
    deployment = Deployment(name or engine.resolve().name, slots, replicas, threads, host, port)
    files = deploy(kind, engine, out, deployment)
    lines = [f"wrote {file}" for file in files]
    data = {"kind": kind, "files": files, "next": f"serve run {files[0]}"}
    console.result(data, lines, f"serve run {files[0]}")
