"""What a release of TensorRT or cuda-core offers, from tests/goldens/tensorrt_api/api.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.conftest import HERE

CUDA = "cuda-core"


@cache
def _file() -> dict[str, Any]:
    return dict(json.loads((HERE / "goldens/tensorrt_api/api.json").read_text()))


def releases() -> list[str]:
    """Those of TensorRT and RTX, oldest first."""
    return [name for name in _file()["releases"] if name != CUDA]


@dataclass(frozen=True)
class Api:
    """facts: by "Class.name" its kind (class, method, property, member), and what is known."""

    release: str
    facts: Mapping[str, tuple[str, Any]]

    def find(self, owner: str, name: str) -> tuple[str, Any] | None:
        """A member of a class or of what it derives from."""
        if f"{owner}.{name}" in self.facts:
            return self.facts[f"{owner}.{name}"]
        for base in self.facts[owner][1] if owner in self.facts else ():
            found = self.find(base, name)
            if found:
                return found
        return None

    def check_call(self, owner: str, name: str, args: int, keywords: Iterable[str]) -> None:
        """Raise AttributeError or TypeError unless there is such a method for such arguments."""
        found = self.find(owner, name)
        if found is None or found[0] != "method":
            raise AttributeError(f"{self.release} has no method {owner}.{name}")
        named = list(keywords)
        if not any(_takes(overload, args, named) for overload in found[1]):
            raise TypeError(f"{self.release}: {owner}.{name} takes {found[1]}, not {args} {named}")


def _takes(overload: Sequence[str], args: int, keywords: Sequence[str]) -> bool:
    plain = [name for name in overload if not name.startswith("*")]
    known = [name.strip("*=") for name in overload]
    given = [name.strip("*=") for name in plain[:args]] + list(keywords)
    needed = {name.strip("*=") for name in overload if not name.endswith("=")}
    return (
        args <= len(plain)
        and len(set(given)) == len(given)
        and set(keywords) <= set(known)
        and needed <= set(given)
    )


def of(release: str) -> Api:
    """The API of a release."""
    file = _file()
    number = file["releases"].index(release)
    facts = {
        name: (kind, about)
        for name, entries in file["facts"].items()
        for kind, about, numbers in entries
        if number in numbers
    }
    return Api(release, facts)
