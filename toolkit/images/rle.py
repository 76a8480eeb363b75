"""Masks as run lengths, as COCO writes them: column after column, zeros first.

Source: cocodataset/cocoapi, whose compressed form writes the lengths as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array

_BITS, _MORE, _SIGN, _FIRST = 5, 0x20, 0x10, 48  # of a character in the compressed form


def encode(mask: Array) -> dict[str, list[int]]:
    """A bool mask [height, width] as {"size": [height, width], "counts": [zeros, ones, ...]}."""
    flat = np.asarray(mask, bool).reshape(mask.shape).T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(ends).tolist()
    starts_with_one = flat.size > 0 and bool(flat[0])
    return {"size": list(mask.shape), "counts": [0] * starts_with_one + counts}


def decode(stored: Mapping[str, Any]) -> Array:
    """The bool mask [height, width] of an object with `size` and `counts`, a list or COCO's text.

    Raises InputError for anything else, and for lengths that do not fill the size.
    """
    size, counts = stored.get("size"), stored.get("counts")
    sides = size if isinstance(size, Sequence) and len(size) == 2 else []
    if not sides or any(type(side) is not int or side < 1 for side in sides):
        raise InputError(f"size = {size!r:.60} of a mask, expected [height, width]")
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    lengths = _lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(lengths, Sequence) or any(type(n) is not int or n < 0 for n in lengths):
        raise InputError(f"counts = {counts!r:.60} of a mask, expected run lengths")
    height, width = sides
    if sum(lengths) != height * width:
        raise InputError(
            f"the runs of a mask have {sum(lengths)} pixels, its size {height} x {width} has "
            f"{height * width}"
        )
    ones = np.arange(len(lengths)) % 2 == 1
    return np.asarray(np.repeat(ones, lengths).reshape(width, height).T)


def _lengths(text: str) -> list[int]:
    """Five bits a character, the least first; from the third length on a difference to the one
    before the last. Raises InputError.
    """
    lengths: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[at]) - _FIRST if at < len(text) else -1
            if not 0 <= code < 2 * _MORE:
                raise InputError(f"counts = {text!r:.60} of a mask is not COCO's text")
            value |= (code & (_MORE - 1)) << shift
            more, shift, at = bool(code & _MORE), shift + _BITS, at + 1
            if not more and code & _SIGN:
                value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
    return lengths
