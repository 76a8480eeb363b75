"""What TensorRT-RTX compiles on the card when it loads a plan, kept for the next time.

RTX plans hold no code for the card's own architecture; TensorRT's do, and this does nothing there.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

_PART = 1 << 20  # bytes at both ends of a plan that tell it from others


def file_of(plan: Path, target: str) -> Path:
    """Where a plan's kernels for a release and card are kept, in the user's cache folder."""
    digest = hashlib.sha256(f"{target} {plan.stat().st_size}".encode())
    with plan.open("rb") as opened:
        digest.update(opened.read(_PART))
        opened.seek(-min(_PART, plan.stat().st_size), os.SEEK_END)
        digest.update(opened.read())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "edgevlm" / "rtx" / f"{plan.stem}-{digest.hexdigest()[:24]}.cache"


def config(trt: Any, engine: Any, file: Path) -> Any:
    """How contexts of an engine are made, with the kernels in `file`; None for TensorRT."""
    if not hasattr(trt, "IRuntimeCache"):
        return None
    made = engine.create_runtime_config()
    made.set_execution_context_allocation_strategy(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    cache = made.create_runtime_cache()
    with suppress(OSError):
        cache.deserialize(file.read_bytes())  # False for one that it does not take: starts anew
    made.set_runtime_cache(cache)
    return made


def keep(config: Any, file: Path) -> None:
    """Write the kernels to `file`, whole or not at all; without a folder to write in, nothing."""
    found = bytes(config.get_runtime_cache().serialize())
    with suppress(OSError):
        if file.exists() and file.read_bytes() == found:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(found)
        part.replace(file)
