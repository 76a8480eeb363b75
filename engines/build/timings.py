"""How long linears take on this machine in each number format, measured once and kept.

Of whole calls by the backend's own runner, formats in turn, the shortest counts: other programs
on a busy machine only lengthen them. Times are kept in the user's cache folder, by processor,
release and threads; without such a folder they are measured again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgevlm.engines import backends
from edgevlm.engines.backends import Backend, Runner, RunnerOptions, Shapes
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.quantization.plan import Precision
from edgevlm.toolkit.target import Target, processor_kind, threads_here

Probe = Callable[[Path, int, int, int, Precision], ComponentRecord]
_BYTES = 96_000_000  # of float32 weights in a probe: more than a core's share of a cache
_MOST_COPIES = 24
_LARGEST = 1 << 28  # bytes of float32 weights; of a larger matrix a part is measured
_SECONDS = 0.4  # of one measurement, in all its formats
_LEAST, _MOST = 5, 50  # runs of one measurement
_PATIENCE = 60.0  # seconds, after which a measurement has two runs


@dataclass(frozen=True)
class Product:
    """rows [rows, inputs] times a weight [inputs, outputs]."""

    inputs: int
    outputs: int
    rows: int


class Timings:
    """Milliseconds of products on this machine; `save` keeps what was measured."""

    def __init__(self, target: Target, probe: Probe, file: Path | None = None) -> None:
        self._target, self._probe = target, probe
        self._backend: Backend = backends.backend(target)
        self._file = file or _file()
        self._known = _read(self._file)
        self._machine = f"{target} {processor_kind()} {threads_here()}"
        self._began = time.perf_counter()

    def ms(self, product: Product, precisions: Sequence[Precision]) -> dict[Precision, float]:
        """Of one linear in each precision; all measured in turn unless all are known."""
        sizes = f"{product.rows} x {product.inputs} x {product.outputs}"
        return self.of_op(sizes, precisions, lambda: self._measure(product, precisions))

    def of_op(
        self,
        op: str,
        precisions: Sequence[Precision],
        measure: Callable[[], dict[Precision, float]],
    ) -> dict[Precision, float]:
        """Of anything that `op` tells apart, measured by `measure` unless all are known."""
        keys = {p: f"{self._machine}: {op} {p}" for p in precisions}
        if not all(key in self._known for key in keys.values()):
            self._known |= {keys[p]: ms for p, ms in measure().items()}
        return {p: self._known[key] for p, key in keys.items()}

    def save(self) -> None:
        """Keep all times for later builds, where a folder for that can be written."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(self._known, indent=0, sort_keys=True), encoding="utf-8")
            part.replace(self._file)

    def _measure(self, product: Product, precisions: Sequence[Precision]) -> dict[Precision, float]:
        """A part of the inputs stands for all of them where the weight is far beyond any cache."""
        part = max(_LARGEST // (4 * product.outputs) // 128 * 128, 128)
        if product.inputs > part:
            times = self._measure(Product(part, product.outputs, product.rows), precisions)
            return {p: round(ms * product.inputs / part, 5) for p, ms in times.items()}
        size = 4 * product.inputs * product.outputs
        copies = min(max(_BYTES // size, 1), _MOST_COPIES)
        x = np.random.default_rng(0).standard_normal((product.rows, product.inputs), np.float32)
        with TemporaryDirectory() as folder, ExitStack() as opened:
            calls = {}
            for precision in precisions:
                runner, names = self._open(Path(folder) / precision, product, copies, precision)
                opened.callback(runner.close)
                calls[precision] = (runner, dict.fromkeys(names, x))
            seconds: dict[Precision, list[float]] = {p: [] for p in precisions}
            begun = time.perf_counter()
            for run in range(_MOST + 1):
                for precision, (runner, inputs) in calls.items():
                    start = time.perf_counter()
                    runner.run(inputs)
                    if run:  # the first one binds buffers
                        seconds[precision].append(time.perf_counter() - start)
                if self._enough(run, begun):
                    break
        return {p: round(1000 * min(s) / copies, 5) for p, s in seconds.items()}

    def _open(
        self, folder: Path, product: Product, copies: int, precision: Precision
    ) -> tuple[Runner, list[str]]:
        source, compiled = folder / "source", folder / "compiled"
        source.mkdir(parents=True)
        compiled.mkdir()
        record = self._probe(source, product.inputs, product.outputs, copies, precision)
        none = Shapes(1, ())
        made = self._backend.compile(source, "fp32", record, compiled, self._target, none)
        record = made.record
        runner = self._backend.open(compiled, record, {}, RunnerOptions(context=1))
        return runner, [port.name for port in record.inputs]

    def _enough(self, run: int, begun: float) -> bool:
        now = time.perf_counter()
        least = 2 if now - self._began > _PATIENCE else _LEAST
        return run >= least and now - begun > _SECONDS


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "edgevlm" / "timings.json"


def _read(file: Path) -> dict[str, float]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): float(ms) for key, ms in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
