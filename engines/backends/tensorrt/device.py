"""The graphics card of this machine, as TensorRT's backend asks for it."""

from __future__ import annotations

from edgevlm.toolkit.card import architecture as architecture
