"""Strict reading of configuration: a key that is not implemented is refused, never ignored.

`Reader` reads a published config.json key by key and refuses the keys that are left over.
`to_plain` and `from_plain` convert our own frozen dataclasses to JSON and back.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgevlm.toolkit import inert_keys
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.inert_keys import BOOKKEEPING as BOOKKEEPING

V = TypeVar("V")
_REQUIRED: Any = object()
# Layers are listed before a file is opened: a wrong number must not take minutes.
MOST_LAYERS = 4096


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError naming file and position."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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


class Reader:
    """One JSON object, read key by key; `done()` refuses every key that was not read."""

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
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {key} = {value!r}, expected {kind.__name__}")
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
            raise ConfigError(f"{where} = {data!r}, expected one of {args}")
        return data
    if origin is tuple:
        return _decode_tuple(args, data, where)
    if origin in (dict, Mapping, typing.get_origin(Mapping[str, int])):
        _expect(isinstance(data, dict), where, data, "an object")
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if kind is Any:
        return data
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    exact = isinstance(data, kind) and not (kind is int and isinstance(data, bool))
    _expect(exact, where, data, kind.__name__)
    return data


def _decode_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, (list, tuple)), where, data, "a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    _expect(len(data) == len(args), where, data, f"{len(args)} values")
    pairs = zip(args, data, strict=True)
    return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(pairs))


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, data, "an object")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{where} has unknown keys: {', '.join(unknown)}")
    optional = (dataclasses.MISSING, dataclasses.MISSING)
    required = {n for n, f in fields.items() if (f.default, f.default_factory) == optional}
    missing = sorted(required - set(data))
    if missing:
        raise ConfigError(f"{where} lacks: {', '.join(missing)}")
    return kind(**{key: _decode(hints[key], data[key], f"{where}.{key}") for key in data})


def _expect(valid: bool, where: str, data: Any, expected: str) -> None:
    if not valid:
        raise ConfigError(f"{where} = {data!r}, expected {expected}")
