"""Which ops of a build get a fused plugin: none, those that are named, or those that won here.

A plugin must beat what TensorRT's builder makes of the op's body, which only a card can tell:
`edgevlm selftest --plugins all` times both there and keeps what they took. Without such times
`auto` takes none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from edgevlm.engines.plugins.catalogue import FOLDERS
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import ConfigError, UnsupportedError
from edgevlm.toolkit.target import Target, card

_GAIN = 0.95  # of the body's time, that a plugin may take at most to be worth it


def chosen(
    asked: str, bundle: Path, target: Target, progress: Callable[[str], None]
) -> tuple[str, ...]:
    """The ops of a bundle that plugins compute: "none", "auto", or names with commas between.

    Raises ConfigError for a name without a plugin, or without a call in the bundle, and
    UnsupportedError where the target takes no plugins.
    """
    if asked == "none":
        return ()
    functions = Bundle.open(bundle).manifest.functions
    if asked == "auto":
        return _winning(functions, target, progress)
    names = named(asked)
    refuse_target(target, names)
    absent = [name for name in names if name not in functions]
    known = [name for name in FOLDERS if name in functions]
    if absent:
        raise ConfigError(
            f"--plugins {','.join(absent)} has no effect: no component of {bundle} calls it",
            hint=f"of those with plugins it calls: {', '.join(known) or 'none'}",
        )
    return names


def named(asked: str) -> tuple[str, ...]:
    """Names of ops with plugins, each once. Raises ConfigError for any other."""
    names = tuple(dict.fromkeys(name.strip() for name in asked.split(",")))
    unknown = [name for name in names if name not in FOLDERS]
    if unknown:
        raise ConfigError(
            f"--plugins {','.join(unknown)}: there is no such plugin",
            hint=f"there are {', '.join(FOLDERS)}",
        )
    return names


def refuse_target(target: Target, names: tuple[str, ...]) -> None:
    """Raise UnsupportedError where no plugin of ours can be built."""
    what = ", ".join(names)
    if target.backend == "tensorrt-rtx":
        raise UnsupportedError(
            f"TensorRT-RTX takes no plugins: it ends a process whose parser takes one ({what})",
            hint="build without --plugins: its builder makes kernels of the bodies",
        )
    if target.backend != "tensorrt":
        raise UnsupportedError(
            f"{target} takes no plugins of TensorRT ({what})", hint="build without --plugins"
        )


# -- what was measured ------------------------------------------------------------------------


def _winning(
    functions: Mapping[str, int], target: Target, progress: Callable[[str], None]
) -> tuple[str, ...]:
    """The ops of a bundle whose plugins took less than their bodies on this machine's card."""
    if target.backend != "tensorrt":
        progress(f"--plugins auto: {target} takes none")
        return ()
    times = measured(target)
    if not times:
        progress("--plugins auto: none was measured here, so none is taken; edgevlm selftest does")
        return ()
    calls = [name for name in FOLDERS if name in functions and name in times]
    won = tuple(name for name in calls if times[name][0] <= _GAIN * times[name][1])
    for name in calls:
        progress(
            f"--plugins auto: {name} took {times[name][0]:.3f} ms, its body {times[name][1]:.3f}"
        )
    return won


def measured(target: Target) -> dict[str, tuple[float, float]]:
    """Milliseconds of plugin and body over all calls of the presets, by op; {} for none known."""
    try:
        found = json.loads(_file(target).read_text(encoding="utf-8"))
        return {str(op): (float(plugin), float(body)) for op, (plugin, body) in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def keep(target: Target, times: Mapping[str, tuple[float, float]]) -> None:
    """Keep what was measured for later builds, where a folder for that can be written."""
    file = _file(target)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({**measured(target), **times}, indent=1), encoding="utf-8")
        part.replace(file)


def _file(target: Target) -> Path:
    """By release and kind of card."""
    release = ".".join(map(str, target.version[:2]))
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{release} {target.arch} {card.name() or ''}").strip("-")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "edgevlm" / "plugins" / f"times-{name}.json"
