"""The graphics card of this machine, as TensorRT's backend asks for it."""

from __future__ import annotations

from edgevlm.toolkit.target import card

architecture = card.architecture
