"""What training and calibration keep to go on with: checkpoints, states, sums over samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Literal

import numpy as np

from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ToolkitError
from edgevlm.training import states
from edgevlm.training.loop import Progress
from tests.fuzz.artifacts import Artifact, Folder
from tests.fuzz.frame import Place, Violation, laid_out, refused
from tests.fuzz.mutations import changed_bytes, changed_json
from tests.pipeline import silent
from tests.refusals import GOLDEN, LM

Kind = Literal["checkpoint", "sums", "state"]
_NAME, _SUMS = "ranges", {"low": np.arange(40.0), "seen": np.arange(3)}


@dataclass(frozen=True)
class Kept:
    """A folder of one of the kinds, with files that differ."""

    kind: Kind
    case: Artifact


class KeptFolders:
    """A trained checkpoint, what a calibration found, and a state of training."""

    name = "kept"
    share = 1

    def __init__(self, place: Place) -> None:
        self._work = place.work
        bases = Path(mkdtemp(prefix="bases-", dir=place.work))
        self._bases: dict[Kind, Path] = {
            "checkpoint": _checkpoint(bases / "checkpoint"),
            "sums": _sums(bases / "sums"),
            "state": _state(bases / "state"),
        }
        self._checkpoint = Folder(self._bases["checkpoint"], trained.CHECKPOINT)

    def seeds(self) -> Mapping[str, Kept]:
        """Each as it is; the checkpoint damaged as bundles are."""
        odd = {"outside": {("files", "../x"): {"nbytes": 1, "sha256": ""}}}
        found = {
            f"checkpoint, {name}": Kept("checkpoint", case)
            for name, case in self._checkpoint.seeds(odd).items()
        }
        whole = Artifact({})
        return found | {"sums": Kept("sums", whole), "state": Kept("state", whole)}

    def mutate(self, rng: Random, seed: Kept) -> Kept:
        """One file more changed."""
        if seed.kind == "checkpoint":
            return Kept(seed.kind, self._checkpoint.mutate(rng, seed.case))
        base = self._bases[seed.kind]
        name = rng.choice(sorted(path.name for path in base.iterdir() if path.name != "lock"))
        before = (base / name).read_bytes()
        data = changed_bytes(rng, before)
        if name == states.FACTS and rng.random() < 0.5:
            data = changed_json(rng, states.read_json(base / name)).encode(errors="surrogatepass")
        return Kept(seed.kind, Artifact({name: data}, data != before))

    def check(self, kept: Kept) -> str:
        """What is kept is taken up as it was, or is refused, or found again."""
        with laid_out(self._bases[kept.kind], kept.case, self._work) as folder:
            try:
                return {"checkpoint": _read, "sums": _taken_up, "state": _resumed}[kept.kind](
                    folder, kept.case
                )
            except ToolkitError as error:
                return refused(error)


def _read(folder: Path, case: Artifact) -> str:
    systems.load(trained.verified(folder), Options())
    if case.damaged:
        raise Violation("damage was not found")
    return "read"


def _taken_up(folder: Path, case: Artifact) -> str:
    kept = Unfinished(folder, "fuzz")
    try:
        kept.begin(silent, "settings")
        if not kept.has(_NAME):
            return "found again"
        arrays = kept.get(_NAME)
    finally:
        kept.close(remove=False)
    if not all(np.array_equal(arrays.get(key), value) for key, value in _SUMS.items()):
        raise Violation("sums were changed")
    return "taken up"


def _resumed(folder: Path, case: Artifact) -> str:
    facts, reached = states._read(folder)
    if (dict(facts), reached) != ({"stage": "fuzz"}, Progress(3, 24, 100)):
        raise Violation("a state was changed")
    if any(name != states.FACTS for name in case.files) and case.damaged:
        raise Violation("damage was not found")
    return "resumed"


def _checkpoint(folder: Path) -> Path:
    source = systems.load(GOLDEN / LM, Options())
    trained.write(
        folder, source.model, source.tokenizer, source.weights, origin={}, training={},
        made_by="edgevlm fuzz",
    )  # fmt: skip
    return folder


def _sums(folder: Path) -> Path:
    kept = Unfinished(folder, "fuzz")
    kept.begin(silent, "settings")
    kept.put(_NAME, _SUMS)
    kept.close(remove=False)
    return folder


class _Accelerator:
    """Of one process, whose state is some bytes."""

    is_main_process = True

    def wait_for_everyone(self) -> None:
        """There is nobody else."""

    def save_state(self, folder: str) -> None:
        """Write it."""
        (Path(folder) / "model.safetensors").write_bytes(bytes(range(256)) * 9)


def _state(folder: Path) -> Path:
    out = folder.with_name("run")
    saved = states.save(_Accelerator(), out, Progress(3, 24, 100), {"stage": "fuzz"})
    saved.rename(folder)
    shutil.rmtree(out)
    return folder
