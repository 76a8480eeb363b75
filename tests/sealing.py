"""Descriptions changed by somebody who knows how: with a seal, sizes and checksums that are right.

What no checksum can tell must be refused for its own sake.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgevlm.toolkit.bundle import checksums, sealed
from edgevlm.toolkit.bundle.atomic import sha256_of


def seal(path: Path, data: dict[str, Any]) -> None:
    """Write a description with its seal."""
    path.write_text(json.dumps(data | {sealed.SEAL: sealed.digest(data)}))


def edit_sealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a description, and seal it again."""
    data = json.loads(path.read_text())
    change(data)
    seal(path, data)


def reseal(path: Path) -> None:
    """Make what a description says of its files true again."""

    def measured(data: dict[str, Any]) -> None:
        folder = path.parent
        for name in data["files"]:
            nbytes = (folder / name).stat().st_size
            data["files"][name] = {"nbytes": nbytes, "sha256": sha256_of(folder / name)}
        if "checksums" in data:
            data["checksums"] = checksums.of_files(folder, data["files"], 1)

    edit_sealed(path, measured)
