"""What a device sustains: its peaks, and the share of them that our kernels reach.

Shares of a processor are measured (docs/sizing.md says on which, and how well predictions hold).
Those of graphics cards are assumed: nothing was run on one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from edgevlm.engines import backends
from edgevlm.engines.backends import Peaks
from edgevlm.engines.lowering import capabilities
from edgevlm.engines.runtime import memory
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import CUDA, DEVICES, Device, Target, this_cpu


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's peaks.

    products: of arithmetic, by the precision of the weights; `int8` and, on processors, all but
    `float` are shares of the peak of 8-bit products, all others of the peak in float. few: of
    the peak in float, of products with less than FEW rows. reading: of the memory rate, of weights
    likewise. depthwise: of the peak in float, of convolutions with few inputs per output;
    attention, cached: of attention, and that over the KV cache; sampling: of deformable attention,
    which gathers; vector: of all other arithmetic.
    activations: of the memory rate, for the cache and for values that such arithmetic reads and
    writes. op_us: microseconds that an op takes at least. Memory besides the model's:
    runtime_bytes of the program, reserved_bytes of a system that shares the memory.
    """

    products: Mapping[str, float]
    few: Mapping[str, float]
    reading: Mapping[str, float]
    depthwise: float
    attention: float
    cached: float
    sampling: float
    vector: float
    activations: float
    op_us: float
    runtime_bytes: int
    reserved_bytes: int = 0


FEW = 16  # rows below which a product is limited by reading and unpacking its weights
FORMATS = ("float", "int8_rows", "int8_weights", "int4_weights", "int8", "fp8")
# One thread of an AMD EPYC with AVX-512 VNNI (Zen 4), ONNX Runtime 1.31.1, processor time of whole
# stages: benchmarks/sizing.py compares.
PROCESSOR = Efficiency(
    products={  # the probes' products are not the fastest
        "float": 1.08,
        "int8_rows": 1.05,
        "int8_weights": 0.57,  # MatMulNBits: 200 GFLOP/s where 8-bit products reach 350
        "int4_weights": 0.52,
        "int8": 0.70,
        "fp8": 1.08,  # multiplied as floats
    },
    few={
        "float": 0.105,
        "int8_rows": 0.28,
        "int8_weights": 0.42,
        "int4_weights": 0.70,
        "int8": 0.28,
        "fp8": 0.105,
    },
    reading=dict.fromkeys(FORMATS, 0.92),
    depthwise=0.2,
    attention=0.95,
    cached=0.75,
    sampling=0.03,  # GridSample, a value at a time: 8.4 ms a level of MMFuser's
    vector=0.05,
    activations=0.6,
    op_us=3.0,
    runtime_bytes=120_000_000,
)
# Of a graphics card's dense tensor-core peaks and its memory rate; assumed.
CARD = Efficiency(
    products={
        "float": 0.5,
        "int8_rows": 0.45,
        "int8_weights": 0.45,
        "int4_weights": 0.45,
        "int8": 0.4,
        "fp8": 0.4,
    },
    few=dict.fromkeys(FORMATS, 0.1),
    reading={
        "float": 0.75,
        "int8_rows": 0.7,
        "int8_weights": 0.7,
        "int4_weights": 0.6,
        "int8": 0.7,
        "fp8": 0.7,
    },
    depthwise=0.02,
    attention=0.3,
    cached=0.3,
    sampling=0.3,
    vector=0.02,
    activations=0.6,
    op_us=1.5,
    runtime_bytes=500_000_000,
)
_SYSTEM_BYTES = 1_500_000_000  # of a Jetson's memory, which it shares with the processor


@dataclass(frozen=True)
class Machine:
    """A device to predict for. memory_bytes: of a device, of this machine what is free; measured:
    whether the peaks were.
    """

    name: str
    target: Target
    peaks: Peaks
    memory_bytes: int
    efficiency: Efficiency
    measured: bool


def machines(target: Target, name: str, dtype: str) -> list[Machine]:
    """The device called `name`, or every known one that `target` fits; this processor is measured.

    dtype: in which floats are stored. Raises UnsupportedError where no figures are known.
    """
    if target == this_cpu():
        return [this_processor()]
    if name in DEVICES:
        return [_card(name, DEVICES[name], target, dtype)]
    found = [
        _card(known, device, target, dtype)
        for known, device in DEVICES.items()
        if target.backend in (device.target.backend, CUDA) and target.holds(device.target.arch)
    ]
    if not found:
        raise UnsupportedError(
            f"there are no figures for the target {name}",
            hint=f"known: cpu (this processor, measured), {', '.join(DEVICES)}",
        )
    return found


def this_processor() -> Machine:
    """This machine, its peaks measured now with ONNX Runtime's kernels."""
    target = this_cpu()
    backend = backends.backend(target)
    with TemporaryDirectory() as folder:
        backend.extras(Path(folder))
        peaks = backend.peaks(Path(folder))
    free = memory.available_bytes() or 0
    return Machine("cpu", target, peaks, free, PROCESSOR, measured=True)


def _card(name: str, device: Device, target: Target, dtype: str) -> Machine:
    """A known device by its vendor's figures; float32 has half the rate of float16 (TF32)."""
    slower = 2 if capabilities.of(target).computes_in(dtype) == "fp32" else 1
    tops = {name: 1000 * rate for name, rate in device.peak_tops.items()}
    rates = tops["fp16"] / slower, tops["int8"], device.bandwidth_gb_s
    peaks = Peaks(*rates, fp8_gflop_s=tops.get("fp8", 0.0))
    shared = name.startswith("jetson")
    found = replace(CARD, reserved_bytes=_SYSTEM_BYTES) if shared else CARD
    size = round(1e9 * device.memory_gb)
    return Machine(name, target, peaks, size, found, measured=False)


def product_rate(machine: Machine, precision: str, rows: int) -> float:
    """10^9 operations per second of a product of `rows` rows with weights in `precision`."""
    share, peaks = machine.efficiency, machine.peaks
    if rows < FEW:
        return share.few[precision] * peaks.gflop_s
    if precision == "fp8" and peaks.fp8_gflop_s:
        return share.products[precision] * peaks.fp8_gflop_s
    in_float = precision in ("float", "fp8") or _on_card(machine)
    integer = precision == "int8" or not in_float
    return share.products[precision] * (peaks.int8_gop_s if integer else peaks.gflop_s)


def _on_card(machine: Machine) -> bool:
    return machine.target.arch.startswith("sm_")


def seconds(amount: float, rate: float) -> float:
    """amount / (rate in 10^9 a second); nothing takes no time."""
    return amount / (rate * 1e9) if amount else 0.0 if rate else math.inf
