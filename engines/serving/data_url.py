"""Images as clients send them: data:image/...;base64,..., within a server's limits."""

from __future__ import annotations

import base64
import binascii

from edgevlm.engines.serving.limits import Limits
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import decode

PREFIX = "data:"
_IMAGE, _BASE64 = "data:image/", ";base64,"


def image_file(url: str, where: str, limits: Limits) -> bytes:
    """The file in a data URL, whose size and pixels are within the limits. Raises InputError."""
    head, found, data = url.partition(_BASE64)
    if not head.startswith(_IMAGE) or not found:
        raise InputError(
            f"{where}: {url[:40]!r} is not read: images come as data:image/...;base64,... only; "
            "this server fetches no addresses and opens no files"
        )
    if len(data) // 4 * 3 > limits.image_bytes + 3:
        raise InputError(f"{where}: an image has at most {limits.image_bytes} bytes")
    try:
        file = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as odd:
        raise InputError(f"{where}: not base64: {odd}") from None
    check_pixels(file, where, limits)
    return file


def check_pixels(file: bytes, where: str, limits: Limits) -> None:
    """Raise InputError for a file that is no image, or one with too many pixels."""
    width, height = decode.size_of(file)
    if width * height > limits.image_pixels:
        raise InputError(
            f"{where}: {width} x {height} pixels; an image has at most {limits.image_pixels}"
        )
