"""An engine that was built before and is kept, where a build would give the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.engines import manifest
from edgevlm.engines.build import check
from edgevlm.engines.manifest import Engine
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import OutputError, ToolkitError

if TYPE_CHECKING:
    from edgevlm.engines.build.build import Request


def existing(
    bundle: Bundle, out: Path, request: Request, context: int, model: Mapping[str, Any]
) -> Engine | None:
    """The engine at `out`, if a build with this request would give the same one.

    Raises OutputError if it would, but what is there is damaged.
    """
    if not (out / manifest.DESCRIPTION).exists():
        return None
    try:
        engine = manifest.read(out)
    except ToolkitError:  # a damaged or foreign description is not the requested one
        return None
    requested = (bundle.sha256, str(request.target), context, model, request.precision)
    actual = (engine.bundle_sha256, engine.target, engine.context, engine.model, engine.precision)
    allowed = check.allowed_loss(request.plan(bundle), request.accept_loss)
    accurate = all(loss <= allowed for loss in engine.build.precision_losses.values())
    tuned = engine.tuning_options == request.tuning.options
    options = replace(request.options, plugins=tuple(sorted(request.options.plugins)))
    tuned = tuned and engine.options == options
    if not (actual == requested and accurate and tuned) or request.force:
        return None
    damage = manifest.faults(out, engine)
    if damage:
        raise OutputError(
            f"{out} exists and is damaged: {damage[0]}", hint="add --force to build it again"
        )
    return engine
