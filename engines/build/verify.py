"""Compare an engine with the reference on the machine that runs it, and note that it was.

An engine for a card that the building machine lacks carries its goldens with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import Compiled
from edgevlm.engines.build import check
from edgevlm.engines.manifest import Engine
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import Golden
from edgevlm.toolkit.bundle.manifest import GOLDENS
from edgevlm.toolkit.errors import BundleError


def verify(folder: Path, progress: Callable[[str], None]) -> Engine:
    """Replay the goldens on every component, and write the errors into engine.json.

    Raises TargetMismatch on another machine, AccuracyError as a build does, and BundleError where
    there are no goldens.
    """
    engine = manifest.read(folder)
    manifest.check(folder, engine)
    rounded = bool(engine.plan.precisions)
    precision = "int8" if rounded else engine.dtype
    if engine.prompt_form is not None:
        raise BundleError(
            f"{folder} has its language model twice and was verified when it was built",
            hint="build it again to compare it again",
        )
    compiled = [
        Compiled(record, (), precision, plugins=engine.plugins) for record in engine.components
    ]
    backend = backends.backend(engine.parsed_target())
    allowed = check.allowed_loss(engine.plan, engine.build.accepted_loss)
    errors = check.compare(
        goldens_of(folder, engine),
        engine.model,
        engine.context,
        compiled,
        backend,
        folder,
        allowed,
        progress,
    )
    build = replace(engine.build, kernel_differences=errors.kernels, precision_losses=errors.losses)
    verified = replace(engine, build=build, verified=True)
    manifest.write(folder, verified)
    return verified


def goldens_of(folder: Path, engine: Engine) -> list[Golden]:
    """The goldens of the engine, or of its bundle. Raises BundleError where neither is here."""
    for file in (folder / GOLDENS, Path(engine.bundle) / GOLDENS):
        if file.exists():
            return goldens.load(file)
    raise BundleError(
        f"{folder} has no goldens, and its bundle {engine.bundle} is not here",
        hint=f"build it again: {engine.rebuild_command(folder, engine.target)}",
    )
