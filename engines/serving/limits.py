"""What a server gives to its clients at most."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

from edgevlm.toolkit.errors import ConfigError, ToolkitError


class Busy(ToolkitError):
    """The queue is full, or the server is stopping."""


class OutOfTime(ToolkitError):
    """A request took longer than it may."""


@dataclass(frozen=True)
class Limits:
    """slots: answers at a time; queue: requests that wait for one.

    Of a request: body and images in bytes, pixels of an image, images, tokens of an answer, seconds
    from its arrival to its last token, seconds until its body is there. image_cache_bytes: feature
    rows of images that are kept for later questions.
    """

    slots: int = 8
    queue: int = 64
    body_bytes: int = 32 << 20
    image_bytes: int = 16 << 20
    image_pixels: int = 25_000_000
    images: int = 16
    max_tokens: int = 2048
    request_s: float = 600.0
    receive_s: float = 30.0
    image_cache_bytes: int = 256 << 20

    def check(self) -> Limits:
        """These limits. Raises ConfigError for one without a meaning."""
        for item in fields(self):
            value, least = getattr(self, item.name), item.name not in ("queue", "image_cache_bytes")
            if value < least:
                option = item.name.replace("_", "-")
                raise ConfigError(f"--{option} {value} is less than {int(least)}")
        return self


def late(deadline: float, end: float, limits: Limits) -> OutOfTime | None:
    """Why a request with this deadline is ended now, if it is. end: when the server ends all that
    is left, infinite while it does not stop. Both in seconds of `time.monotonic`.
    """
    if time.monotonic() < min(deadline, end):
        return None
    stopping = end < float("inf")
    why = "the server is stopping" if stopping else f"{limits.request_s:g} s have passed"
    return OutOfTime(f"the request was ended: {why}")
