"""Every kernel on this machine's card, as an engine would launch it: right, and how fast.

    python -m edgevlm.engines.plugins.selftest [--small] > report.json

PTX goes through NVIDIA's driver with cuda-core, without torch; results are compared with the
reference. What TensorRT itself makes of a plugin is not asked here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any

import numpy as np

from edgevlm.engines.plugins.catalogue import SITES, SMALL, Site
from edgevlm.engines.plugins.compile import PTX_ISA, Compiled
from edgevlm.engines.plugins.trial import Trial, difference, floats, stored, trial
from edgevlm.toolkit.errors import ToolkitError, UnsupportedError, needing
from edgevlm.toolkit.ops.vocabulary import Array

# Of the largest value: what a format rounds to; a merge rounds normed levels too.
MOST = {"fp32": 2e-5, "fp16": 1.5e-3, "bf16": 1.2e-2}
_RUNS = 20


class Card:
    """This machine's first graphics card, through cuda-core.

    Raises MissingExtra without that package, UnsupportedError for a card without PTX of ours.
    """

    def __init__(self) -> None:
        with needing("cuda-core", "kernels", purpose="running kernels"):
            self._core = import_module("cuda.core")
        try:
            self._device = self._core.Device(0)
            self._device.set_current()
        except Exception as error:  # the package's own, of many kinds, for a missing driver or card
            raise UnsupportedError(
                f"there is no graphics card that CUDA can use: {error}",
                hint="edgevlm doctor says what this machine has",
            ) from None
        self.name = str(self._device.name)
        self.sm = int("".join(map(str, self._device.compute_capability)))
        if self.sm not in PTX_ISA:
            raise UnsupportedError(
                f"{self.name} is sm_{self.sm}, for which no kernels are compiled",
                hint=f"they are for {', '.join(f'sm_{sm}' for sm in PTX_ISA)}",
            )
        self._stream = self._device.create_stream()
        self._pinned = self._core.LegacyPinnedMemoryResource()

    def run(
        self,
        made: Compiled,
        programs: int,
        inputs: Sequence[Array],
        scalar: int,
        like: Sequence[Array],
    ) -> tuple[list[Array], float]:
        """Results shaped and typed as `like`, and the median time of a launch in milliseconds."""
        code = self._core.ObjectCode.from_ptx(made.ptx.encode())
        kernel = code.get_kernel(made.name)
        sent = [self._sent(array) for array in inputs]
        results = [self._device.allocate(array.nbytes, stream=self._stream) for array in like]
        config = self._core.LaunchConfig(
            grid=programs, block=made.threads, shmem_size=made.shared_bytes
        )
        pointers = [int(buffer.handle) for buffer in (*sent, *results)]
        count = len(sent)
        arguments = (*pointers[:count], np.int32(scalar), *pointers[count:])
        timing = self._core.EventOptions(timing_enabled=True)
        taken = []
        for _ in range(_RUNS):
            start = self._stream.record(options=timing)
            self._core.launch(self._stream, config, kernel, *arguments)
            end = self._stream.record(options=timing)
            self._stream.sync()
            taken.append(float(end - start))
        found = [self._received(r, array) for r, array in zip(results, like, strict=True)]
        return found, statistics.median(taken)

    def _sent(self, array: Array) -> Any:
        host = self._pinned.allocate(array.nbytes)
        ctypes.memmove(int(host.handle), np.ascontiguousarray(array).ctypes.data, array.nbytes)
        buffer = self._device.allocate(array.nbytes, stream=self._stream)
        buffer.copy_from(host, stream=self._stream)
        self._stream.sync()
        return buffer

    def _received(self, buffer: Any, like: Array) -> Array:
        host = self._pinned.allocate(like.nbytes)
        buffer.copy_to(host, stream=self._stream)
        self._stream.sync()
        result = np.empty_like(like)
        ctypes.memmove(result.ctypes.data, int(host.handle), like.nbytes)
        return result


def check(card: Card, site: Site, dtype: str, seed: int) -> dict[str, Any]:
    """One kernel in one format."""
    asked: Trial = trial(site, dtype, np.random.default_rng(seed))
    like = [stored(array, dtype) for array in asked.expected]
    made = site.compiled(dtype, card.sm)
    found, took_ms = card.run(made, site.programs(dtype), asked.inputs, site.scalar, like)
    pairs = zip(found, asked.expected, strict=True)
    worst = max(difference(floats(array, dtype), expected) for array, expected in pairs)
    work = site.work(dtype)
    return {
        "site": site.name,
        "op": site.op,
        "dtype": dtype,
        "difference": worst,
        "right": worst < MOST[dtype],
        "ms": took_ms,
        "gb_s": work.floor_bytes / took_ms / 1e6,
    }


def report(card: Card, sites: Sequence[Site], seed: int) -> dict[str, Any]:
    """All kernels in all formats, and what they ran on."""
    rows = [check(card, site, dtype, seed) for site in sites for dtype in MOST]
    versions = {name: _version(name) for name in ("triton", "cuda-core", "numpy")}
    machine = {"card": card.name, "sm": card.sm, "machine": platform.machine()}
    return {**machine, "versions": versions, "seed": seed, "rows": rows}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def main(arguments: Sequence[str]) -> int:
    """Print the report as JSON; 1 if a kernel is wrong or cannot run."""
    parser = argparse.ArgumentParser(prog="python -m edgevlm.engines.plugins.selftest")
    parser.add_argument("--small", action="store_true", help="small shapes, for a quick answer")
    asked = parser.parse_args(arguments)
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    try:
        found = report(Card(), SMALL if asked.small else SITES, seed)
    except ToolkitError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1))
    return 0 if all(row["right"] for row in found["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
