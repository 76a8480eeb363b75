"""Opening the components of an engine, several at a time: each packs its weights on one thread."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from edgevlm.engines import backends
from edgevlm.engines.backends import Runner, RunnerOptions
from edgevlm.engines.manifest import Engine
from edgevlm.engines.runtime.two_forms import TwoForms
from edgevlm.toolkit.errors import BuildError, TargetMismatch, ToolkitError


def open_components(
    folder: Path,
    engine: Engine,
    options: Mapping[str, RunnerOptions],
    cores: int,
    opened: ExitStack,
) -> dict[str, Runner]:
    """Runners by component; `opened` closes them.

    options: by component. If one cannot be opened, the reason of the first such one is raised.
    """
    backend = backends.backend(engine.parsed_target())
    second = [engine.prompt_form.record] if engine.prompt_form else []
    records = [*engine.components, *second]
    largest = sorted(records, key=lambda record: -engine.files[record.weights].nbytes)
    with ThreadPoolExecutor(max(min(cores, len(records)), 1)) as pool:
        futures = {
            record.weights: pool.submit(
                partial(backend.open, folder, record, engine.model, options[record.name])
            )
            for record in largest
        }
    for future in futures.values():
        if future.exception() is None:
            opened.callback(future.result().close)
    try:
        runners = {record.name: futures[record.weights].result() for record in engine.components}
        for record in second:
            prompts = futures[record.weights].result()
            runners[record.name] = TwoForms(prompts, runners[record.name])
    except (BuildError, TargetMismatch) as refused:
        raise _with_rebuilding(refused, folder, engine) from None
    return runners


def _with_rebuilding(refused: ToolkitError, folder: Path, engine: Engine) -> ToolkitError:
    """The same with the command that builds the engine again, unless it has a hint of its own."""
    command = engine.rebuild_command(folder, engine.target)
    return type(refused)(refused.message, hint=refused.hint or f"build it again: {command}")
