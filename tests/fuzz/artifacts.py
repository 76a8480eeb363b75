"""Folders that edgevlm writes, changed: what bundles, engines and checkpoints share.

A change without its checksums is damage, and must be found. One whose checksums are right again is
somebody's work, and must be refused or be harmless.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from edgevlm.toolkit.bundle import sealed
from tests.fuzz.frame import Changed
from tests.fuzz.mutations import changed_bytes, changed_json

_DESCRIBED = 0.5  # of the cases change the description
_RESEALED = 0.6  # of the cases have right checksums


@dataclass(frozen=True)
class Artifact(Changed):
    """damaged: whether no checksum was made right again. deep: whether much is tried with it."""

    damaged: bool = False
    deep: bool = False


class Folder:
    """The files of an artifact, and what changes them."""

    def __init__(self, base: Path, description: str) -> None:
        self.base = base
        self.description = description
        self.stated: dict[str, Any] = json.loads((base / description).read_text())
        self._contents = {path.name: path.read_bytes() for path in base.iterdir()}
        self._others = sorted(self.stated["files"])

    def seeds(self, odd: Mapping[str, Mapping[Sequence[Any], Any]]) -> dict[str, Artifact]:
        """The folder as it is, and with values of its description replaced, by the way to them."""
        found = {"whole": Artifact({}, deep=True)}
        for name, changes in odd.items():
            data = json.loads(json.dumps(self.stated))
            for way, value in changes.items():
                place = data
                for key in way[:-1]:
                    place = place[key]
                place[way[-1]] = value
            found[name] = Artifact({self.description: _sealed(json.dumps(data))})
        for name in self._others:
            flipped = bytearray(self._contents[name])
            flipped[len(flipped) // 2] ^= 0x40
            found[f"a bit of {name}"] = Artifact({name: bytes(flipped)}, damaged=True)
            found[f"zeros in {name}"] = Artifact({name: bytes(len(flipped))}, damaged=True)
            found[f"no {name}"] = Artifact({name: None}, damaged=True)
        return found

    def mutate(self, rng: Random, seed: Artifact) -> Artifact:
        """The description or another file changed, with checksums that are right or wrong."""
        files, resealed = dict(seed.files), rng.random() < _RESEALED
        if rng.random() < _DESCRIBED:
            text = changed_json(rng, self.stated)
            files[self.description] = (
                _sealed(text) if resealed else text.encode(errors="surrogatepass")
            )
            damaged = not resealed and _parsed(text) != self.stated
        else:
            name = rng.choice(self._others)
            other = self._contents[rng.choice(self._others)]
            data = changed_bytes(rng, self._contents[name], other)
            files, damaged = {name: data}, not resealed and data != self._contents[name]
            if resealed:
                files[self.description] = self._measured(name, data)
        return Artifact(files, damaged, rng.random() < 0.1)

    def _measured(self, name: str, data: bytes) -> bytes:
        """The description with the size and the checksums of one file made right."""
        stated = json.loads(json.dumps(self.stated))
        stated["files"][name] = {"nbytes": len(data), "sha256": sha256(data).hexdigest()}
        if "checksums" in stated:
            stated["checksums"][name] = [f"{zlib.crc32(data):08x}"]
        return _sealed(json.dumps(stated))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _sealed(text: str) -> bytes:
    """A description with its seal, as far as it is one at all."""
    data = _parsed(text)
    if not isinstance(data, dict):
        return text.encode(errors="surrogatepass")
    try:
        seal = sealed.digest(data)
    except (ValueError, RecursionError):
        return text.encode(errors="surrogatepass")
    old = json.dumps(data.get(sealed.SEAL))
    return text.replace(f'"{sealed.SEAL}": {old}', f'"{sealed.SEAL}": "{seal}"').encode(
        errors="surrogatepass"
    )
