"""What fails on a graph that somebody else may have written, told as that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgevlm.toolkit.errors import BundleError, ToolkitError


@contextmanager
def of_bundle(what: str) -> Iterator[None]:
    """What fails on a graph that export would not have written is told as that: BundleError.

    Rewriting follows names, attributes and shapes that the checksums of our own graphs vouch for.
    """
    try:
        yield
    except (ToolkitError, OSError, MemoryError):
        raise
    except Exception as odd:
        kind = type(odd).__name__
        raise BundleError(
            f"{what} is not as export writes it ({kind}: {odd!s:.200})",
            hint="export the bundle again",
        ) from odd
