"""The two products behind one API: TensorRT and TensorRT-RTX, and what of them is installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from edgevlm.engines.backends.tensorrt import device
from edgevlm.toolkit.errors import MissingExtra, TargetMismatch, needing
from edgevlm.toolkit.target import Target, Version, release


@dataclass(frozen=True)
class Flavour:
    """backend: in targets. module: what Python imports. packages: that bring it, any of them.
    extra: of ours. needs_device: whether building needs the graphics card that runs the engine.
    """

    backend: str
    module: str
    packages: tuple[str, ...]
    extra: str
    needs_device: bool

    def installed(self) -> Version:
        """The installed release, () for none."""
        for package in self.packages:
            try:
                return release(metadata.version(package))
            except metadata.PackageNotFoundError:
                continue
        return ()

    def load(self) -> Any:
        """The module. Raises MissingExtra."""
        with needing(self.packages[0], self.extra, purpose="building engines"):
            module = import_module(self.module)
        return module

    def here(self) -> Target:
        """The installed release and this machine's card."""
        return Target(self.backend, self.installed(), device.architecture() or "no-device")

    def check_release(self, target: Target) -> None:
        """Raise MissingExtra or TargetMismatch unless the target's release is the installed one."""
        installed = self.installed()
        if not installed:
            raise MissingExtra(self.packages[0], self.extra, purpose=f"building for {target}")
        if installed[: len(target.version)] != target.version:
            have, want = (".".join(map(str, v)) for v in (installed, target.version))
            raise TargetMismatch(
                f"{target} needs {self.backend} {want}, here is {have}",
                hint=f"pip install '{self.packages[0]}=={want}.*'",
            )


TENSORRT = Flavour(
    "tensorrt",
    "tensorrt",
    ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt",
    needs_device=True,
)
RTX = Flavour(
    "tensorrt-rtx",
    "tensorrt_rtx_bindings",
    ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    "tensorrt-rtx",
    needs_device=False,
)
FLAVOURS = {flavour.backend: flavour for flavour in (TENSORRT, RTX)}
