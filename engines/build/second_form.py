"""The language model once more, in the precision that reads prompts fastest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgevlm.engines.backends import Backend, Plugin, Shapes
from edgevlm.engines.backends.native import is_ours
from edgevlm.engines.build import check, native
from edgevlm.engines.build.check import Errors
from edgevlm.engines.build.native_decoder import IN_PROMPTS as IN_PROMPTS
from edgevlm.engines.manifest import PromptForm
from edgevlm.toolkit.bundle.manifest import MANIFEST, Bundle, FileRecord, read_manifest, record_file
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import Target


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
    plugins: tuple[Plugin, ...]


def add(
    wanted: SecondForm,
    bundle: Bundle,
    backend: Backend,
    folder: Path,
    target: Target,
    shapes: Shapes,
    allowed: float,
    progress: Callable[[str], None],
    ours: Mapping[str, tuple[Plugin, ...]],
) -> Added:
    """Compile and check the second form as a whole, then cut off what only logits need.

    ours: our kernels by component, and for this form under its name and IN_PROMPTS. Raises
    AccuracyError as for any component.
    """
    path = folder / "prompts"
    try:
        wanted.write(path)
        alone = Bundle(path, read_manifest(path / MANIFEST), bundle.model)
        (record,) = alone.manifest.components
        progress(f"{record.name}: lowering for {target}, to read prompts")
        dtype = alone.manifest.dtype
        compiled = backend.compile(path, dtype, record, folder, target, shapes)
        (checked,), errors = native.checked(
            [native.added(compiled, folder, ours.get(record.name + IN_PROMPTS, ()))],
            folder,
            lambda parts: check.check(alone, parts, backend, folder, allowed, progress),
            progress,
        )
        used = tuple(plugin for plugin in checked.plugins if is_ours(plugin))
        cut = backend.without_logits(folder, record)
        compiled = native.added(replace(compiled, record=cut), folder, used)
        files = {name: record_file(folder / name) for name in compiled.files}
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return Added(PromptForm(cut, wanted.plan), files, errors, compiled.plugins)
