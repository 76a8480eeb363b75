"""States to resume from: written whole or not at all, the last two are kept.

OUT/states/step-000120/     accelerate's files, and run.json: what the run is and where it stands
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.bundle import checksums, sealed
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.strict import from_plain, read_json
from edgevlm.training.loop import Progress

FOLDER, FACTS = "states", "run.json"
KEPT = 2


def save(accelerator: Any, out: Path, progress: Progress, facts: Mapping[str, Any]) -> Path:
    """Write the state of all processes as OUT/states/step-N; facts: what the run is.

    A state of that step that exists is kept: it is the same.
    """
    home = out / FOLDER
    final = home / f"step-{progress.step:06d}"
    partial = home / f".{final.name}.partial"
    if final.exists():
        return final
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {
            "run": dict(facts),
            "progress": progress.state_dict(),
            "checksums": checksums.of_files(partial, _files(partial)),
        }
        sealed.write(partial / FACTS, state)
        partial.rename(final)
        for old in found(out)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def found(out: Path) -> list[Path]:
    """The complete states of a run, the oldest first."""
    return sorted(path for path in (out / FOLDER).glob("step-*") if (path / FACTS).exists())


def _files(folder: Path) -> list[str]:
    """All files of a state, by their path in it."""
    every = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in every)


def _read(state: Path) -> tuple[Mapping[str, Any], Progress]:
    """The facts of a state, and where it stands. Raises ConfigError for one that was damaged."""
    stated = read_json(state / FACTS, ours=True)
    data = sealed.opened(stated, str(state / FACTS), required=False)  # older ones have no seal
    known = data.get("checksums")
    if known is not None:
        names = [name for name in _files(state) if name != FACTS]
        actual = {n: [*pieces] for n, pieces in checksums.of_files(state, names).items()}
        wrong = sorted(n for n in {*known, *actual} if known.get(n) != actual.get(n))
        if wrong:
            raise ConfigError(f"{state / wrong[0]} is missing or damaged (CRC-32 differs)")
    progress = from_plain(Progress, data.get("progress"), f"{state / FACTS}: progress")
    return data.get("run", {}), progress


def resume(accelerator: Any, out: Path, progress: Progress, facts: Mapping[str, Any]) -> None:
    """Load the newest state of OUT. Raises ConfigError if it is of another run."""
    states = found(out)
    if not states:
        return  # killed before the first state: the run starts again
    hint = f"remove that folder; {len(states) - 1} earlier state(s) are left"
    try:
        run, reached = _read(states[-1])
    except ConfigError as damaged:
        raise CheckpointError(damaged.message, hint=hint) from None
    check_same(run, facts, states[-1])
    try:
        accelerator.load_state(str(states[-1]), strict=False)
    except (OSError, RuntimeError, ValueError, KeyError) as broken:
        reason = str(broken).splitlines()[0]
        raise CheckpointError(
            f"{states[-1]} cannot be loaded: {reason}",
            hint=hint,
        ) from None
    progress.load_state_dict(reached.state_dict())


def check_same(saved: Mapping[str, Any], facts: Mapping[str, Any], where: Path) -> None:
    """Raise ConfigError naming the first thing in which two runs differ."""
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ConfigError(
                f"{where} is of another run: its {name} is {saved.get(name)!r}, now {value!r}",
                hint="resume with the options of the run, or train into another folder",
            )
