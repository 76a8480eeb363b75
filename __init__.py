"""edgevlm: deploy multi-encoder vision-language models.

The public surface is what `__all__` names; everything else may move between releases. Names are
imported when they are first used, so `import edgevlm` itself is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgevlm.api import build_engine as build_engine
    from edgevlm.api import export_bundle as export_bundle
    from edgevlm.api import train as train
    from edgevlm.engines.runtime.embedding import Embedder as Embedder
    from edgevlm.engines.runtime.sampling import Sampling as Sampling
    from edgevlm.engines.runtime.session import Answer as Answer
    from edgevlm.engines.runtime.session import Question as Question
    from edgevlm.engines.runtime.session import Session as Session
    from edgevlm.toolkit.bundle.manifest import Bundle as Bundle
    from edgevlm.toolkit.errors import ToolkitError as ToolkitError

__version__ = "0.1.0"

_HOME = {
    "Answer": "engines.runtime.session",
    "Bundle": "toolkit.bundle.manifest",
    "Embedder": "engines.runtime.embedding",
    "Question": "engines.runtime.session",
    "Sampling": "engines.runtime.sampling",
    "Session": "engines.runtime.session",
    "ToolkitError": "toolkit.errors",
    "build_engine": "api",
    "export_bundle": "api",
    "train": "api",
}
__all__ = [  # noqa: F822 (the names come from __getattr__)
    "Answer",
    "Bundle",
    "Embedder",
    "Question",
    "Sampling",
    "Session",
    "ToolkitError",
    "build_engine",
    "export_bundle",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"edgevlm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'edgevlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
