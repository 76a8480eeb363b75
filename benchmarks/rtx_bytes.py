"""What the kernels of NVIDIA's builder move where a fused plugin might move less.

`python -m benchmarks.rtx_bytes` builds layers of our models with TensorRT-RTX, on this machine,
without a card: a block of ConvNeXt-L in each stage that ConvLLaVA has at 768 pixels, and what lies
between two products of a transformer's layer, the sum with the residual and the norm of it, as
CLIP-L and Qwen2.5-0.5B have them. For each it counts kernels, and the bytes of the tensors that
they read and write, each once, in passes over the layer's own tensor; of a block, as two more
blocks cost it, so that the ends of the graph do not count. Beside them: how much less time a block
and the tower would take, at the vendor's rates, with a kernel that moved its floor alone. Nothing
runs on a card. Needs the extra tensorrt-rtx; about ten minutes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common import Report, parser, workplace
from edgevlm.engines import backends
from edgevlm.engines.backends import Shapes
from edgevlm.export import write
from edgevlm.toolkit.models.encoders import convnext
from edgevlm.toolkit.ops.vocabulary import Ops, Weights
from edgevlm.toolkit.target import DEVICES, parse
from edgevlm.toolkit.vlm.components import Component, Port
from edgevlm.toolkit.vlm.presets import CONVNEXT_L_5

RELEASE = "tensorrt-rtx@1.7"
STAGES = ((192, 192), (384, 96), (768, 48), (1536, 24), (3072, 12))
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
# Whether other cards and formats get other kernels is asked of one stage.
FORMATS = (("fp16", "sm_80"), ("fp16", "sm_120"), ("bf16", "sm_89"), ("fp32", "sm_89"))
PRODUCTS = ("/up", "/down", "/out", "/q")


@dataclass(frozen=True)
class Moved:
    """Kernels and bytes of a layer: of all, and of what lies between the products. names: of the
    kernels of the whole graph.
    """

    kernels: int
    passes: float
    between: float
    names: tuple[str, ...]


def blocks(count: int, channels: int, side: int) -> Component:
    """So many blocks of ConvNeXt, one after the other."""
    config, stage = convnext.Config((count,), (channels,)), "stages.0."
    shapes = {n: s for n, s in convnext.shapes(config).items() if n.startswith(stage)}

    def forward(op: Ops[Any], w: Weights[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        x = given["x"]
        for j in range(count):
            x = convnext._block(op, w / f"{stage}blocks.{j}", x, config, channels)
        return {"y": x}

    shape = (1, side, side, channels)
    ends = Port("x", "float", shape), Port("y", "float", shape)
    return Component("part", forward, shapes, ends[:1], ends[1:])


def residual(hidden: int, tokens: int, norm: str) -> Component:
    """A product, whose result is added to x; the norm of the sum, and a product of that."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("out.weight", "q.weight"), (hidden, hidden))
    shapes |= dict.fromkeys(("norm.weight", "norm.bias")[: 2 if norm == "layer" else 1], (hidden,))

    def forward(op: Ops[Any], w: Weights[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        x = op.add(given["x"], op.linear(given["mixed"], w / "out"))
        of = op.layer_norm if norm == "layer" else op.rms_norm
        return {"x_next": x, "y": op.linear(of(x, w / "norm", 1e-6), w / "q")}

    ports = [Port(n, "float", (1, tokens, hidden)) for n in ("x", "mixed", "x_next", "y")]
    return Component("part", forward, shapes, tuple(ports[:2]), tuple(ports[2:]))


def built(component: Component, dtype: str, card: str, work: Path) -> list[dict[str, Any]]:
    """The kernels of a component as the builder lists them."""
    target, generator = parse(f"{RELEASE}/{card}"), np.random.default_rng(0)
    draw = generator.standard_normal
    weights = {n: draw(s, np.float32) / 16 for n, s in component.shapes.items()}
    with TemporaryDirectory(dir=work) as name:
        source, folder = Path(name), Path(name, "engine")
        folder.mkdir()
        recorded = write.record(component, dtype)
        write.write_graph(source, recorded, "part.onnx", "part.safetensors", weights)
        record = write.describe(component, "part.onnx", "part.safetensors")
        backend = backends.backend(target)
        backend.compile(source, dtype, record, folder, target, Shapes(1, ({},)))
        found: list[dict[str, Any]] = json.loads((folder / "part.kernels.json").read_text())
        return found


def counted(kernels: Sequence[Mapping[str, Any]], one: int) -> Moved:
    """Of a listing; one: bytes of a pass over the layer's own tensor."""
    apart = [k for k in kernels if not any(n.endswith(PRODUCTS) for n in k["nodes"])]
    whole, between = (sum(k["moved_bytes"] for k in some) / one for some in (kernels, apart))
    return Moved(len(kernels), whole, between, tuple(k["name"] for k in kernels))


def of_block(channels: int, side: int, dtype: str, card: str, work: Path) -> Moved:
    """What a block adds to those before it."""
    one = BYTES[dtype] * channels * side * side
    few, many = (counted(built(blocks(n, channels, side), dtype, card, work), one) for n in (1, 3))
    return Moved(
        (many.kernels - few.kernels) // 2,
        (many.passes - few.passes) / 2,
        (many.between - few.between) / 2,
        many.names,
    )


def gains(device: str) -> dict[str, list[float]]:
    """Times without and with a plugin, as quotients: of a block in each stage, and of the tower.

    A kernel takes as long as its bytes or its products at the vendor's rates. "convolve and norm":
    in one kernel, with the sum in the second product. "multiply": both products in one kernel.
    """
    card, found = DEVICES[device], dict[str, list[float]]()
    rate, moved = 1e12 * card.peak_tops["fp16"], 1e9 * card.bandwidth_gb_s
    whole: dict[str, list[float]] = {name: [] for name in ("body", "convolve and norm", "multiply")}
    for channels, side in STAGES:
        one, weights = 2 * channels * side * side, 2 * 4 * channels**2
        work = 4 * channels * one / rate  # of a product: 8 * channels^2 a pixel
        first = max((5 * one + weights) / moved, work)
        summed = max((6 * one + weights) / moved, work)
        both = max((2 * one + 2 * weights) / moved, 2 * work)
        whole["body"].append(7 * one / moved + 2 * first)
        whole["convolve and norm"].append(2 * one / moved + first + summed)
        whole["multiply"].append(7 * one / moved + both)
    towers = {
        n: sum(d * t for d, t in zip(CONVNEXT_L_5.depths, ts, strict=True))
        for n, ts in whole.items()
    }
    for name in list(whole)[1:]:
        pairs = zip(whole["body"], whole[name], strict=True)
        ratios = [body / plugin for body, plugin in pairs]
        found[name] = [round(x, 2) for x in (*ratios, towers["body"] / towers[name])]
    return found


def measured(work: Path) -> Iterator[tuple[str, str, str, Moved]]:
    """Layer, format, card, and what moves."""
    for channels, side in STAGES:
        name = f"ConvNeXt, {channels} channels, {side} x {side}"
        yield name, "fp16", "sm_89", of_block(channels, side, "fp16", "sm_89", work)
        if channels == STAGES[1][0]:
            for dtype, card in FORMATS:
                yield name, dtype, card, of_block(channels, side, dtype, card, work)
    sums = (
        ("CLIP-L, 577 tokens", 1024, 577, "layer"),
        ("Qwen2.5-0.5B, 256 tokens", 896, 256, "rms"),
        ("Qwen2.5-0.5B, one token", 896, 1, "rms"),
    )
    for name, hidden, tokens, norm in sums:
        for dtype, card in (("fp16", "sm_89"), ("bf16", "sm_120"), ("fp16", "sm_80")):
            listed = built(residual(hidden, tokens, norm), dtype, card, work)
            yield name, dtype, card, counted(listed, BYTES[dtype] * hidden * tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser(__doc__).parse_args(arguments)
    columns = "layer", "format", "card", "kernels", "passes", "of them between products"
    result = Report("rtx_bytes", columns, ("edgevlm", "onnx", "tensorrt-rtx-cu13-libs"))
    with workplace(options) as work:
        for name, dtype, card, moved in measured(work):
            print(name, dtype, card, moved, file=sys.stderr, flush=True)
            row = name, dtype, card, moved.kernels, round(moved.passes, 2), round(moved.between, 2)
            result.rows.append(row)
            result.measured[f"{name} {dtype} {card}"] = list(moved.names)
        result.measured["gains"] = {name: gains(name) for name in DEVICES}
        return 0 if result.finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
