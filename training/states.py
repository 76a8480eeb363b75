"""States to resume from: written whole or not at all, the last two are kept.

OUT/states/step-000120/     accelerate's files, and run.json: what the run is and where it stands
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.strict import read_json
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
        state = {"run": dict(facts), "progress": progress.state_dict()}
        (partial / FACTS).write_text(json.dumps(state, indent=1))
        partial.rename(final)
        for old in found(out)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def found(out: Path) -> list[Path]:
    """The complete states of a run, the oldest first."""
    return sorted(path for path in (out / FOLDER).glob("step-*") if (path / FACTS).exists())


def resume(accelerator: Any, out: Path, progress: Progress, facts: Mapping[str, Any]) -> None:
    """Load the newest state of OUT. Raises ConfigError if it is of another run."""
    states = found(out)
    if not states:
        return  # killed before the first state: the run starts again
    state = read_json(states[-1] / FACTS)
    check_same(state.get("run", {}), facts, states[-1])
    try:
        accelerator.load_state(str(states[-1]), strict=False)
    except (OSError, RuntimeError, ValueError, KeyError) as broken:
        reason = str(broken).splitlines()[0]
        raise CheckpointError(
            f"{states[-1]} cannot be loaded: {reason}",
            hint=f"remove that folder; {len(states) - 1} earlier state(s) are left",
        ) from None
    progress.load_state_dict(state["progress"])


def check_same(saved: Mapping[str, Any], facts: Mapping[str, Any], where: Path) -> None:
    """Raise ConfigError naming the first thing in which two runs differ."""
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ConfigError(
                f"{where} is of another run: its {name} is {saved.get(name)!r}, now {value!r}",
                hint="resume with the options of the run, or train into another folder",
            )
