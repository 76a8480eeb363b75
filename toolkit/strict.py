"""Strict reading of configuration: a key that is not implemented is refused, never ignored.

`Reader` reads a published config.json key by key and refuses the keys that are left over.
`to_plain` and `from_plain` convert our own frozen dataclasses to JSON and back.
"""

from __future__ import annotations

import dataclasses
import json
import math
import stat
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from edgevlm.toolkit import inert_keys
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.inert_keys import BOOKKEEPING as BOOKKEEPING

V = TypeVar("V")
_REQUIRED: Any = object()
# Layers are listed before a file is opened: a wrong number must not take minutes.
MOST_LAYERS = 4096
MOST_JSON_BYTES = 1 << 28  # the largest tokenizer.json that is published has an eighth of it
MOST_NESTED = 100
_MOST_INT = 1 << 63
_MOST_VALUES = 1 << 18  # of a list; the vocabulary's, in lists of tokens


def read_json(path: Path, *, ours: bool = False) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError naming file and position.

    ours: whether we wrote it; then no key occurs twice, and no number is NaN or infinite.
    """
    try:
        data = _parsed(_text(path), ours=ours)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except OSError as refused:
        raise ConfigError(f"{path} cannot be read: {refused.strerror}") from None
    except (ValueError, RecursionError) as broken:
        # Not UTF-8, not JSON, a number of too many digits, or nested too deeply.
        raise ConfigError(f"{path} is not valid JSON: {broken}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def read_text(path: Path) -> str:
    """The text of a file. Raises ConfigError for one that is not UTF-8, or cannot be read."""
    try:
        return _text(path)
    except OSError as refused:
        raise ConfigError(f"{path} cannot be read: {refused.strerror}") from None
    except ValueError as broken:
        raise ConfigError(f"{path} is no text in UTF-8: {broken}") from None


def _text(path: Path) -> str:
    """A file's text. Raises ValueError for one that cannot be a description, such as a device."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > MOST_JSON_BYTES:
        raise ValueError(f"{found.st_size} bytes, expected at most {MOST_JSON_BYTES}")
    return path.read_text(encoding="utf-8")


def _parsed(text: str, *, ours: bool) -> Any:
    """JSON that is not nested deeper than what works on it can follow."""
    strictly: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _no_number}
    data = json.loads(text, **(strictly if ours else {}))
    level = [data] if isinstance(data, (dict, list)) else []
    for _ in range(MOST_NESTED):
        items = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [x for inner in items for x in inner if type(x) is dict or type(x) is list]
        if not level:
            return data
    raise ValueError(f"it is nested more than {MOST_NESTED} deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r:.80} occurs twice")
    return data


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


class Reader:
    """One JSON object, read key by key; `done()` refuses every key that was not read.

    What reads a value raises ConfigError that names file, key and value.
    """

    def __init__(self, data: Mapping[str, Any], where: str, allow: Iterable[str] = ()) -> None:
        self._data = dict(data)
        self._open = set(data) - BOOKKEEPING
        self._allow = set(allow)
        self.where = where

    def take(self, key: str, kind: type[V], default: V = _REQUIRED) -> V:
        """The value of `key`; null counts as absent. An int is accepted as a float."""
        self._open.discard(key)
        value = self._data.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self._absent(key)
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = _as_float(value, f"{self.where}: {key}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {key} = {value!r:.200}, expected {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.where}: {key} = {value!r}, expected a finite number")
        return value

    def _absent(self, key: str) -> ConfigError:
        if key in self._data:
            return ConfigError(
                f"{self.where}: {key} is null, and the model cannot be made without its value",
                hint="take config.json from the place where the weights come from",
            )
        return ConfigError(f"{self.where} lacks the key {key!r}")

    def count(
        self,
        key: str,
        default: int = _REQUIRED,
        *,
        least: int = 1,
        most: int = 1 << 62,
        nullable: bool = False,
    ) -> int:
        """The value of `key`: a size or a number of things, from `least` to `most`.

        A missing key means `default`; null does so only if `nullable`, since the classes that
        read a null size fail.
        """
        if self.given(key) and not self.has(key) and not nullable:
            raise self._absent(key)
        value = self.take(key, int, default)
        if not least <= value <= most:
            limit = f"{least} to {most}" if value > least else f"at least {least}"
            raise ConfigError(f"{self.where}: {key} = {value}, expected {limit}")
        return value

    def positive(self, key: str, default: float = _REQUIRED) -> float:
        """The value of `key`: a finite number above 0; null is refused."""
        if self.given(key) and not self.has(key):
            raise self._absent(key)
        value = self.take(key, float, default)
        if value <= 0:
            raise ConfigError(f"{self.where}: {key} = {value}, expected a number above 0")
        return value

    def share(
        self, key: str, whole: int, default: int = _REQUIRED, *, nullable: bool = False
    ) -> int:
        """The value of `key`: a count that divides `whole` evenly."""
        value = self.count(key, default, nullable=nullable)
        if whole % value:
            raise ConfigError(f"{self.where}: {key} = {value} does not divide {whole}")
        return value

    def optional(self, key: str, kind: type[V]) -> V | None:
        """The value of `key`, or None when it is absent or null."""
        self._open.discard(key)
        return self.take(key, kind) if self.has(key) else None

    def choice(
        self, key: str, allowed: Iterable[V], default: V = _REQUIRED, *, nullable: bool = True
    ) -> V:
        """The value of `key`, which must be one of `allowed`; null is `default` if `nullable`."""
        if self.given(key) and not self.has(key) and not nullable:
            raise self._absent(key)
        self._open.discard(key)
        value = self._data.get(key)
        if value is None:
            value = default
        options = list(allowed)
        if value is _REQUIRED:
            raise self._absent(key)
        if not any(
            value == option and isinstance(value, bool) is isinstance(option, bool)
            for option in options
        ):
            names = ", ".join(repr(name) for name in options)
            raise ConfigError(
                f"{self.where}: {key} = {value!r} is not implemented",
                hint=f"implemented: {names}",
            )
        return typing.cast(V, value)

    def sub(self, key: str) -> Reader:
        """A reader over the object stored under `key`."""
        value = self.take(key, dict)
        return Reader(value, f"{self.where}: {key}", self._allow)

    def raw(self, key: str) -> Any:
        """The value of `key` without a check; None when absent."""
        self._open.discard(key)
        return self._data.get(key)

    def has(self, key: str) -> bool:
        """Whether `key` is present and not null."""
        return self._data.get(key) is not None

    def skip(self, *keys: str) -> None:
        """Mark keys that are read elsewhere."""
        self._open.difference_update(keys)

    def ignore(self, name: str) -> None:
        """Mark the keys that cannot change a number for a class of toolkit/inert_keys.py."""
        self._open.difference_update(inert_keys.inert(name))

    def given(self, key: str) -> bool:
        """Whether `key` is present, even if it is null."""
        return key in self._data

    def done(self) -> None:
        """Refuse every key that was neither taken nor skipped."""
        left = self._open - self._allow
        decisive = sorted(k for k in left if inert_keys.decides(k, self._data[k]))
        if decisive:
            stated = ", ".join(f"{key} = {self._data[key]!r}"[:200] for key in decisive)
            raise ConfigError(
                f"{self.where}: {stated} changes what the model computes and is not implemented",
                hint="take a checkpoint without it",
            )
        unknown = sorted(left - inert_keys.DECISIVE.keys())
        if unknown:
            flags = " ".join(f"--ignore-key {key}" for key in unknown)
            raise ConfigError(
                f"{self.where} has unknown keys: {', '.join(unknown)}",
                hint="search the code that the checkpoint was trained with for each name; only if "
                f"its model never reads it when it answers, add {flags}",
            )


def to_plain(value: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars that json.dumps accepts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def to_json(value: Any) -> str:
    """One line of ASCII that every JSON parser reads: a number that is none or infinite is null."""
    return json.dumps(_finite(to_plain(value)), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def from_plain(kind: type[V], data: Any, where: str) -> V:
    """The inverse of to_plain for type `kind`. ConfigError at the first value that does not fit."""
    return typing.cast(V, _decode(kind, data, where))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        plain = [a for a in args if a in (int, str) and type(data) is a]
        return _decode((plain or [a for a in args if a is not type(None)])[0], data, where)
    if origin is typing.Literal:
        if not any(data == option and type(data) is type(option) for option in args):
            raise ConfigError(f"{where} = {data!r:.200}, expected one of {args}")
        return data
    if origin is tuple:
        return _decode_tuple(args, data, where)
    if origin is list:
        return [*_decode_tuple((args[0], Ellipsis), data, where)]
    if origin in (dict, Mapping, typing.get_origin(Mapping[str, int])):
        _expect(isinstance(data, dict), where, data, "an object")
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if kind is Any:
        return data
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return _as_float(data, where)
    exact = isinstance(data, kind) and not (kind is int and isinstance(data, bool))
    _expect(exact, where, data, kind.__name__)
    if kind is float:
        _expect(math.isfinite(data), where, data, "a finite number")
    if kind is int:
        _expect(-_MOST_INT <= data < _MOST_INT, where, data, "a number of at most 64 bits")
    return data


def _as_float(value: int, where: str) -> float:
    """A whole number as a float. Raises ConfigError for one that has too many digits."""
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{where} = {value!r:.40}..., which is too large") from None


def _decode_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, (list, tuple)), where, data, "a list")
    if len(data) > _MOST_VALUES:
        raise ConfigError(f"{where} has {len(data)} values, expected at most {_MOST_VALUES}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    _expect(len(data) == len(args), where, data, f"{len(args)} values")
    pairs = zip(args, data, strict=True)
    return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(pairs))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass; finding them takes longer than all the rest."""
    return typing.get_type_hints(kind)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, data, "an object")
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{where} has unknown keys: {', '.join(unknown):.200}")
    optional = (dataclasses.MISSING, dataclasses.MISSING)
    required = {n for n, f in fields.items() if (f.default, f.default_factory) == optional}
    missing = sorted(required - set(data))
    if missing:
        raise ConfigError(f"{where} lacks: {', '.join(missing)}")
    return kind(**{key: _decode(hints[key], data[key], f"{where}.{key}") for key in data})


def _expect(valid: bool, where: str, data: Any, expected: str) -> None:
    if not valid:
        raise ConfigError(f"{where} = {data!r:.200}, expected {expected}")
