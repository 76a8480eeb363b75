"""A machine with a release of TensorRT and a card, both stood in for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgevlm.engines.backends.tensorrt import device, flavours
from edgevlm.engines.backends.tensorrt.flavours import RTX, TENSORRT, Flavour
from edgevlm.toolkit.target import Target, Version, release
from tests.conftest import ROOT
from tests.engines.backends.tensorrt import cuda_standin, trt_standin
from tests.engines.backends.tensorrt.cuda_standin import World
from tests.engines.backends.tensorrt.trt_standin import Made

RELEASES = {
    "10.3.0": "sm_87",
    "10.13.3.9": "sm_110",
    "10.16.1.11": "sm_87",
    "11.4.0.106": "sm_90",
    "rtx-1.4.0.76": "sm_89",
    "rtx-1.7.1.116": "sm_89",
}
OLDER = ("10.3.0", "10.13.3.9")  # which cannot update a cache in place


@dataclass(frozen=True)
class Machine:
    """flavour: of the two products; target: this machine's."""

    flavour: Flavour
    target: Target
    world: World
    made: Made


def installed(
    name: str,
    patch: pytest.MonkeyPatch,
    folder: Path,
    world: World | None = None,
    card: str = "",
) -> Machine:
    """The machine, for one test; also for processes that it starts.

    world: a card for the real cuda-core, None for a stand-in of both. card: its architecture.
    """
    flavour, card = RTX if name.startswith("rtx-") else TENSORRT, card or RELEASES[name]
    version = release(name.removeprefix("rtx-"))

    def found(self: Flavour) -> Version:
        return version if self == flavour else ()

    world = world or cuda_standin.install(patch)
    module = trt_standin.make(name, world, card)
    patch.setitem(sys.modules, flavour.module, module)
    patch.setattr(flavours.Flavour, "installed", found)
    patch.setattr(device, "architecture", lambda number=0: card)
    environment = trt_standin.as_package(folder, flavour.module, name, card, ROOT)
    for key, value in environment.items():
        patch.setenv(key, value)
    return Machine(flavour, Target(flavour.backend, version[:2], card), world, module.made)
