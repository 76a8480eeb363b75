"""The verb `edgevlm verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgevlm.toolkit.terminal.flags import Debug, Json, Quiet, opened_console


def verify(
    context: typer.Context,
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare an engine with the reference on this machine, which has its graphics card."""
    from edgevlm.engines.build import summary
    from edgevlm.engines.build.verify import verify as compared

    console = opened_console(as_json, quiet, context)
    console.result(*summary.built_engine(compared(engine, console.step), engine, True, False))
