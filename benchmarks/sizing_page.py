"""docs/sizing.md: predictions for published shapes on known devices, and how well they hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.common import RESULTS, ROOT
from edgevlm import sizing
from edgevlm.engines.sizing.predict import Prediction
from edgevlm.engines.sizing.towers import TowerPrediction
from edgevlm.toolkit.target import DEVICES
from edgevlm.toolkit.terminal.console import human_bytes

PAGE = ROOT / "docs/sizing.md"
PRECISIONS = "fp16,int8,int4"
PRESETS = (
    "llava-qwen2-0.5b",
    "llava-1.5-7b",
    "llava-next-7b",
    "convllava-7b-768",
    "convllava-7b-1536",
    "comm-7b",
    "mmfuser-7b",
    "mlcd-embodied-7b",
    "mlcd-bigg-448-7b",
    "mlcd-seg-7b",
)
TOWERS = ("clip-l14-336", "unicom-b32", "unicom-l14-336", "mlcd-bigg-448")
IN_TOWERS = "fp16,int8-static,int4"
SOURCES = {
    "jetson-orin-nano": "Jetson Orin Nano 8 GB, 25 W mode (Jetson Orin Nano Super data sheet)",
    "jetson-agx-orin": "Jetson AGX Orin 64 GB, MAXN (Jetson AGX Orin Series technical brief)",
    "jetson-thor": "Jetson T5000 128 GB (Jetson Thor data sheet)",
    "rtx-laptop": "GeForce RTX 4060 Laptop (Ada GPU architecture white paper)",
    "rtx-4090": "GeForce RTX 4090 (Ada GPU architecture white paper)",
    "rtx-5090": "GeForce RTX 5090 (RTX Blackwell GPU architecture white paper)",
    "l4": "L4 (L4 data sheet)",
    "a100": "A100 80 GB SXM (A100 data sheet)",
    "h100": "H100 SXM (H100 data sheet)",
    "h200": "H200 SXM (H200 data sheet)",
    "b200": "B200 (Blackwell architecture data sheet)",
}
HEAD = """# Sizing

What `edgevlm plan` predicts for published shapes on known devices: does a model fit, how long is
the first token awaited, how fast do the others come. The command knows every preset, checkpoint
and bundle, and any image size, length and context:

```
edgevlm plan preset:llava-1.5-7b --target jetson-orin-nano,h100 --precision fp16,int4
edgevlm plan path/to/checkpoint --target cpu --precision int8,int4
edgevlm plan preset:unicom-l14-336 --target all --precision fp16,int8-static
```

This page is written by `python -m benchmarks.sizing --page`; a test compares it.

## How

- **Memory** is the estimate of `build --dry-run`: weights in the number format, KV cache at full
  context, and the largest activations. Besides, 0.5 GB for the runtime on a card (0.12 on a
  processor), and 1.5 GB of a Jetson's memory for its system. TensorRT-RTX stores the float
  weights of a language model twice (measured: docs/tensorrt.md), and TensorRT before 10.15 the KV
  cache.
- **Time** adds up all ops of one question, from their FLOPs and bytes (`toolkit/ops/costs.py`):
  each takes as long as the slower of its arithmetic and its traffic, at a share of the device's
  peak, and a moment to start. Prompts are read in pieces of 256 tokens.
- **Of this processor** (`--target cpu`) the peaks are measured when the command runs, with the
  kernels that engines use, and the shares were measured too: [below](#checked). **Of graphics
  cards** the peaks are their vendor's and the shares are assumed: half of the arithmetic, three
  quarters of the memory rate. No card was at hand; take those times as what good kernels reach,
  not as a measurement.
- One image of 640 x 480 pixels and 32 tokens of text in, 64 tokens out, a context of 4,096 or
  what the question needs. `int8` and `int4` are the formats of [build](cli.md#build): on cards
  weights alone, so that prompts take as long as in fp16.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, devices(), checked(), *map(section, PRESETS), towers()]
    return "\n".join(parts)


def devices() -> str:
    """The figures of every known device, and where they are from."""
    rows = [
        (
            f"`{name}`",
            SOURCES[name],
            f"{device.memory_gb:g}",
            f"{device.bandwidth_gb_s:g}",
            f"{device.peak_tops['fp16']:g}",
            f"{device.peak_tops['int8']:g}",
            f"{device.peak_tops['fp8']:g}" if "fp8" in device.peak_tops else "none",
        )
        for name, device in DEVICES.items()
    ]
    what = ("device", "what, and whose figures", "GB", "GB/s")
    columns = (*what, "TFLOP/s, fp16", "TOP/s, int8", "TFLOP/s, fp8")
    said = "Dense rates, NVIDIA's figures; GeForce's are of sums in float32."
    return f"## Devices\n\n{said}\n\n{markdown(columns, rows)}"


def section(preset: str) -> str:
    """The predictions for one preset."""
    planned = sizing.plan(f"preset:{preset}", sizing.ALL, PRECISIONS)
    found = [p for p in planned if isinstance(p, Prediction)]
    first = found[0]
    columns = ("device", *(f"{name}: {what}" for name in PRECISIONS.split(",") for what in WHAT))
    names = dict.fromkeys(p.device for p in found)
    rows = [
        (f"`{name}`", *(cell for p in found if p.device == name for cell in _cells(p)))
        for name in names
    ]
    prompt = f"{first.prompt_tokens:,} prompt tokens, {first.image_tokens:,} of them image."
    text = f"{prompt}{_limits(found)}{_masks(found)}"
    return f"## {preset}\n\n{text}\n\n{markdown(columns, rows)}"


def _masks(found: Sequence[Prediction]) -> str:
    """What a mask takes behind the answer, by device, where the model makes any."""
    told = [
        f"`{p.device}` {_digits(p.mask_ms)} ms"
        for p in found
        if p.mask_ms is not None and p.precision == "fp16"
    ]
    shown = "One mask behind the answer (SAM ViT-H sees 1024 x 1024 pixels), in fp16"
    return f" {shown}: {', '.join(told)}." if told else ""


def towers() -> str:
    """Images a second of towers by themselves."""
    text = (
        "## Towers by themselves\n\nImages a second of the tower alone, in batches of 8, and the "
        "memory that they take. `int8-static` and `int4` are those of [calibrate](cli.md#calibrate)"
        ".\n"
    )
    return "\n".join([text, *(f"### {name}\n\n{_tower(name)}" for name in TOWERS)])


def _tower(preset: str) -> str:
    found = sizing.plan(f"preset:{preset}", sizing.ALL, IN_TOWERS)
    columns = ("device", *(f"{n}: {what}" for n in IN_TOWERS.split(",") for what in OF_TOWERS))
    rows = []
    for name in dict.fromkeys(p.device for p in found):
        cells = [
            (human_bytes(round(p.total_bytes, -6)), _digits(p.images_per_s))
            for p in found
            if isinstance(p, TowerPrediction) and p.device == name
        ]
        rows.append((f"`{name}`", *(cell for pair in cells for cell in pair)))
    return markdown(columns, rows)


OF_TOWERS = ("memory", "images/s")
WHAT = ("memory", "first token", "tokens/s")


def _cells(p: Prediction) -> tuple[str, str, str]:
    """Memory, time to the first token and rate; no times where it does not fit."""
    held = human_bytes(round(p.total_bytes, -7))
    if not p.fits:
        return f"{held}: too much", "", ""
    rate = p.output_token_throughput_per_user
    return held, f"{_digits(p.time_to_first_token_ms)} ms", _digits(rate)


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _limits(found: Sequence[Prediction]) -> str:
    """Where less than the asked context or all tiles fit."""
    told = []
    for p in found:
        if not p.fits and p.largest_context:
            told.append(f"`{p.device}` in {p.precision}: a context of {p.largest_context:,}")
    return f" What fits after all: {'; '.join(told)}." if told else ""


OF_ENGINES = (
    "the rows of llava; those of comm and convllava, whose decoders have one layer here, were "
    "predicted with them. All 0.5B presets have the decoder of 24 layers."
)
OF_PARTS = (
    "engines of llava. Presets have the same decoder of 24 layers: it was measured once in every "
    "precision, behind prompts of their lengths, and their vision sides in front of a decoder of "
    "one layer; a row adds up both."
)


def in_parts(data: dict[str, Any]) -> bool:
    """Whether what was measured are presets, in parts, and not engines."""
    return all("decoder" not in name for name in data["measured"])


def checked() -> str:
    """Predictions beside measurements, from benchmarks/results/sizing.json."""
    data: dict[str, Any] = json.loads((RESULTS / "sizing.json").read_text())
    rows = []
    for name, found in data["measured"].items():
        m, p = found["measured_ms"], found["predicted_ms"]
        rows.append(
            (
                name,
                f"{m['first'] / 1000:.2f}",
                f"{p['first'] / 1000:.2f}",
                f"{p['first'] / m['first']:.2f} x",
                f"{m['decode']:.1f}",
                f"{p['decode']:.1f}",
                f"{p['decode'] / m['decode']:.2f} x",
            )
        )
    columns = ("engine", "first token, CPU s", "predicted", "", "ms a token", "predicted", "")
    device, versions = data["device"], data["versions"]
    where = (
        f"`python -m benchmarks.sizing`: one thread of an {device['processor']}, processor time, "
        f"random weights, ONNX Runtime {versions['onnxruntime']}, {data['date']}, peaks measured "
        f"before and after each engine (the machine's load was {device['load_average']:g}). The "
        f"shares of peaks were fitted to {OF_PARTS if in_parts(data) else OF_ENGINES} Wall time on "
        "several threads was not compared."
    )
    return f"## Checked\n\n{where}\n\n{markdown(columns, rows)}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"
