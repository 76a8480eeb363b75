"""Mutations of bytes and of JSON, decided by a random.Random alone."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from random import Random
from typing import Any

_BOUNDARIES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_HEADER = 256  # half of all changes of bytes fall into the first so many
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"),
    float("nan"), 4096, 4097, 65_536, 100_000, 10**6, 10**7, 2**31, 2**32, 2**53 + 1, 2**62,
    2**63 - 1, 2**63, 2**64, -(2**63), 10**25, 10**400, 10**4299, 10**5000,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", ".", "..", "../x", "/etc/passwd", "/dev/zero", "a/b", "a\\b", "~", "-rf", "*",
    "[", "{}", "%s%n", "null", "NaN", "1", "x" * 5000, "\ud800", "é", "\u202e", "\u2028", "A\nB",
    "\x1b[2J\x1b]0;title\x07", "<image>", "</s>", "fp32", "clip", "llama", "lm", "batch",
    "https://example.com/a", "mlp2x_gelu", "mlp99999999999x_gelu", "*a" * 40 + "b", "z" * 200_000,
)  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [{}], {"a": 1}, [1, 2, 3], [None], ["a"], [-2], [1e400],
    [0] * 1000, [[0, 1]] * 50,
)  # fmt: skip
_DEPTHS = (50, 150, 330, 490, 950, 990, 5000, 100_000)
_DEEPEST, _LARGEST = 60, 1e100
_DEEP = "@deep-{}-{}@"  # stands for JSON that json.dumps could not write


def changed_bytes(rng: Random, data: bytes, other: bytes = b"") -> bytes:
    """`data` with one to eight changes; other: what a piece may be taken from."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not changed:
            break
        _change(rng, changed, other or data)
    return bytes(changed)


def _change(rng: Random, data: bytearray, other: bytes) -> None:
    end = len(data) if rng.random() < 0.5 else min(len(data), _HEADER)
    at, kind = rng.randrange(end), rng.randrange(10)
    to = min(len(data), at + rng.randrange(1, 200))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at:to]
    elif kind == 4:
        data[at:at] = data[at:to]
    elif kind == 5:
        data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(_BOUNDARIES))
    elif kind == 6:
        data[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(_BOUNDARIES) & 0xFFFF)
    elif kind == 7:
        sizes = (0, 1 << 40, 1 << 63, (1 << 64) - 1, len(data), len(data) + 1)
        data[at : at + 8] = struct.pack("<Q", rng.choice(sizes))
    elif kind == 8:
        begin = rng.randrange(len(other)) if other else 0
        data[at:to] = other[begin : begin + to - at]
    else:
        data += rng.randbytes(rng.randrange(1, 50))


def odd_value(rng: Random) -> Any:
    """A value that a field of JSON was not made for."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice(TEXTS)
    if kind == 7:
        return rng.choice(_ODD)
    if kind == 8:
        return rng.randrange(-10, 5000) * rng.choice((1, 1, 1.5))
    return _DEEP.format(rng.choice(_DEPTHS), rng.choice("[{"))


def changed_json(rng: Random, data: Any) -> str:
    """The text of `data` with one to four changes: values, keys, kinds, depth, duplicates."""
    data = json.loads(json.dumps(data))
    # A seed may be nested as deep as JSON can be read; what is within is not changed.
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = [path for path in _paths(data) if path]
        if places:
            _edit(rng, data, rng.choice(places), places)
    text = written(data)
    if rng.random() < 0.05 and isinstance(data, dict) and data:
        twice = json.dumps(rng.choice(list(data)))
        text = f"{{{twice}: {written(odd_value(rng))}, {text.lstrip()[1:]}"
    return text


def _paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data)
    if isinstance(data, (dict, list)) and len(path) < _DEEPEST:
        for key, value in items:
            if isinstance(value, (dict, list)):
                yield from _paths(value, (*path, key))
            else:
                yield (*path, key)


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def _edit(rng: Random, data: Any, path: tuple[Any, ...], places: list[tuple[Any, ...]]) -> None:
    try:
        parent, key = _at(data, path[:-1]), path[-1]
        old = parent[key]
    except (KeyError, IndexError, TypeError):  # an earlier change removed it
        return
    kind = rng.randrange(10)
    if kind < 3 and type(old) in (int, float) and abs(old) < _LARGEST:
        near = (old + 1, old - 1, old * 2, -old, old * 1000, str(old), [old], old * 10**12)
        parent[key] = rng.choice(near)
    elif kind < 6:
        parent[key] = odd_value(rng)
    elif kind == 6:
        del parent[key]
    elif kind == 7:
        try:
            parent[key] = json.loads(json.dumps(_at(data, rng.choice(places))))
        except (KeyError, IndexError, TypeError, ValueError):
            parent[key] = None
    elif kind == 8 and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = odd_value(rng)
    elif isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = parent.pop(key)
    else:
        parent.append(odd_value(rng))


def written(data: Any) -> str:
    """JSON text, in which the marks of deep values became as many brackets, with all digits."""
    limit = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0
    if limit:
        sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(data)
    finally:
        if limit:
            sys.set_int_max_str_digits(limit)
    for depth in _DEPTHS:
        for opening, begin, end in (("[", "[", "]"), ("{", '{"a":', "}")):
            mark = json.dumps(_DEEP.format(depth, opening))
            if mark in text:
                inner = "" if opening == "[" else "1"
                text = text.replace(mark, begin * depth + inner + end * depth)
    return text
