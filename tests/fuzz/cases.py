"""The classes of cases, in the order in which they are counted.

A class has `name`, `share` (of 16 cases), and the methods of frame.Cases: `seeds()` by name,
`mutate(rng, seed)`, which gives a case of the seed's kind, and `check(case)`, which gives a word
and raises frame.Violation. Folders are changed with frame.Changed and frame.laid_out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.fuzz.bundles import Bundles
from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.engines import Engines
from tests.fuzz.frame import Cases
from tests.fuzz.images import Images
from tests.fuzz.kept import KeptFolders
from tests.fuzz.requests import Requests

CLASSES: tuple[type[Cases[Any]], ...] = (
    Images,
    Requests,
    Checkpoints,
    Bundles,
    Engines,
    KeptFolders,
)


def class_of(number: int, names: Sequence[str] = ()) -> type[Cases[Any]]:
    """The class of case `number`: each gets its share. names: those to choose among."""
    among = [kind for kind in CLASSES if not names or kind.name in names]
    order = [kind for kind in among for _ in range(kind.share)]
    return order[number % len(order)]


def named(name: str) -> type[Cases[Any]]:
    """The class of this name. Raises KeyError."""
    return {kind.name: kind for kind in CLASSES}[name]
