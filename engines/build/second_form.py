"""The language model once more, in the precision that reads prompts fastest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgevlm.engines.backends import Backend, Shapes
from edgevlm.engines.build import check
from edgevlm.engines.build.check import Errors
from edgevlm.engines.manifest import PromptForm
from edgevlm.toolkit.bundle.manifest import MANIFEST, Bundle, FileRecord, read_manifest, record_file
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import Target

IN_PROMPTS = ", prompts"  # behind the component's name, where errors are listed


@dataclass(frozen=True)
class SecondForm:
    """Its plan, and how to write it: as a folder with the language model alone."""

    plan: PrecisionPlan
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Added:
    """What was added to an engine."""

    form: PromptForm
    files: dict[str, FileRecord]
    errors: Errors


def add(
    wanted: SecondForm,
    bundle: Bundle,
    backend: Backend,
    folder: Path,
    target: Target,
    shapes: Shapes,
    allowed: float,
    progress: Callable[[str], None],
) -> Added:
    """Compile and check the second form as a whole, then cut off what only logits need.

    Raises AccuracyError as for any component.
    """
    path = folder / "prompts"
    try:
        wanted.write(path)
        alone = Bundle(path, read_manifest(path / MANIFEST), bundle.model)
        (record,) = alone.manifest.components
        progress(f"{record.name}: lowering for {target}, to read prompts")
        dtype = alone.manifest.dtype
        compiled = backend.compile(path, dtype, record, folder, target, shapes)
        errors = check.check(alone, [compiled], backend, folder, allowed, progress)
        cut = backend.without_logits(folder, record)
        files = {name: record_file(folder / name) for name in compiled.files}
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return Added(PromptForm(cut, wanted.plan), files, errors)
