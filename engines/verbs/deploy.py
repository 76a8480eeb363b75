"""The verb `edgevlm deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import Debug, Json, Quiet, Threads, opened_console


def deploy(
    kind: Annotated[str, typer.Argument(help="ray or triton.")],
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    name: Annotated[
        Optional[str], typer.Option(help="The model's name; default: the engine's folder.")
    ] = None,
    slots: Annotated[
        Optional[int],
        typer.Option(help="Answers at a time of one replica, 8; of a tower images."),
    ] = None,
    replicas: Annotated[
        Optional[int], typer.Option(help="Replicas at most: 4 of Ray, 1 of Triton.")
    ] = None,
    host: Annotated[
        Optional[str], typer.Option(help="Ray: address to listen on; default: 127.0.0.1.")
    ] = None,
    port: Annotated[
        Optional[int], typer.Option(help="Ray: port to listen on; default: 8000.")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Triton: leave the engine where it is.")
    ] = False,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what another serving system needs to run an engine: Ray Serve or Triton."""
    from edgevlm.engines.serving.deploy import Deployment, deploy

    console = opened_console(as_json, quiet)
    named = name or engine.resolve().name
    deployment = Deployment(named, slots, replicas, threads, host, port, reference)
    files, following = deploy(kind, engine, out, deployment)
    lines = [f"wrote {file}" for file in files]
    data = {"kind": kind, "files": files, "next": following}
    console.result(data, lines, following)
