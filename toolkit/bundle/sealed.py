"""Descriptions that tell whether they were changed: manifest.json, engine.json, checkpoint.json.

`seal` is the SHA-256 of everything else in the file, so a changed number is found even where no
other check can know it. It is also how a folder is known as one of ours: other programs have a
manifest.json too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.strict import to_plain

SEAL = "seal"
_DIGITS = 64


def text_of(description: Any) -> str:
    """A description as the text of its file, sealed. ASCII, as a path in it need not be UTF-8."""
    plain = to_plain(description)
    return json.dumps({**plain, SEAL: digest(plain)}, indent=1) + "\n"


def write(path: Path, description: Any) -> None:
    """Write a description, a dataclass or a mapping, with its seal."""
    path.write_text(text_of(description), encoding="utf-8")


def digest(data: Mapping[str, Any]) -> str:
    """The seal of a JSON object: however its file is indented, and in whatever order."""
    rest = {key: value for key, value in data.items() if key != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def opened(data: Mapping[str, Any], where: str, *, required: bool = True) -> dict[str, Any]:
    """A description without its seal. Raises ConfigError if it was changed since it was written.

    required: whether one without a seal is refused.
    """
    if data.get(SEAL) != digest(data) and (required or SEAL in data):
        what = "was changed after it was written" if SEAL in data else f"lacks its {SEAL}"
        raise ConfigError(f"{where} {what}")
    return {key: value for key, value in data.items() if key != SEAL}


def is_ours(data: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a description that we wrote, be it damaged since."""
    seal, maker = data.get(SEAL), data.get("made_by")
    written = isinstance(seal, str) and len(seal) == _DIGITS and isinstance(maker, str)
    return written and isinstance(data.get("files"), dict)
