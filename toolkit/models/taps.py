"""Taps: which hidden states of a transformer tower are its outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, TypeVar

from edgevlm.toolkit.errors import ConfigError


class Tapped(Protocol):
    """A tower's configuration with `num_layers` blocks and `taps`."""

    @property
    def num_layers(self) -> int: ...

    @property
    def taps(self) -> tuple[int, ...]: ...


C = TypeVar("C", bound=Tapped)


def resolve_taps(config: C, taps: tuple[int, ...], where: str) -> C:
    """`config` with taps counted from 0 (before the first block) to num_layers (after the last).

    Raises ConfigError for a state that the tower does not have.
    """
    states = config.num_layers + 1
    for tap in taps:
        if not -states <= tap < states:
            raise ConfigError(
                f"{where}: select layer {tap} does not exist in a tower of "
                f"{config.num_layers} blocks"
            )
    resolved = tuple(tap % states for tap in taps)
    changed: Any = replace(config, taps=resolved)  # type: ignore[type-var]
    return changed  # type: ignore[no-any-return]


def depth_needed(taps: tuple[int, ...]) -> int:
    """Blocks that must run for these taps; later ones are never recorded or stored."""
    return max(taps)
