"""A card's limits: products and copies, large enough that nothing else counts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.engines.backends import Peaks
from edgevlm.engines.backends.common import best_seconds
from edgevlm.engines.backends.tensorrt import builder, plan
from edgevlm.engines.backends.tensorrt.arrays import size
from edgevlm.engines.backends.tensorrt.builder import Job
from edgevlm.engines.backends.tensorrt.card import Card, Cards
from edgevlm.engines.backends.tensorrt.context import Context
from edgevlm.toolkit.errors import needing
from edgevlm.toolkit.target import has_fp8

if TYPE_CHECKING:
    import onnx

_SIDE = 4096  # of the matrices
_BYTES = 256_000_000  # that are copied


def peaks(cards: Cards, trt: Any, module: str, capabilities: list[str], arch: str) -> Peaks:
    """Products in fp16, INT8 and, where the card has it, FP8, which TensorRT builds for the
    purpose, and the rate of copies.

    capabilities: the card in the words of RTX. arch: the card, as sm_89. Raises MissingExtra,
    TargetMismatch, or BuildError where one of them cannot be built.
    """
    with ExitStack() as stack:
        card = stack.enter_context(cards.lent())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rates = {}
        for kind in ("fp16", "int8", *(["fp8"] if has_fp8(arch) else [])):
            graph, made = folder / f"{kind}.onnx", folder / f"{kind}.plan"
            graph.write_bytes(product(kind, _SIDE).SerializeToString())
            job = Job(module, str(graph), str(made), [], capabilities, 0, "")
            builder.build(f"a product in {kind}", job, folder)
            rates[kind] = 2 * _SIDE**3 / _seconds(card, trt, made) / 1e9
        return Peaks(rates["fp16"], rates["int8"], _copied(card), rates.get("fp8", 0.0))


def product(kind: str, side: int) -> onnx.ModelProto:
    """x [side, side] in fp16 times a constant; both rounded before where `kind` is int8 or fp8."""
    with needing("onnx", "export", purpose="measuring a graphics card"):
        from onnx import TensorProto, helper, numpy_helper

    weight = 2 * np.random.default_rng(0).integers(-49, 50, (side, side)).astype(np.int8)
    constants: dict[str, Any] = {"w": weight.astype(np.float16)}
    x, w, nodes = "x", "w", []
    if kind != "fp16":
        constants = {"codes": weight, "scale": np.float16(2**-6), "zero": np.int8(0)}
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_codes"]),
            helper.make_node("DequantizeLinear", ["x_codes", "scale", "zero"], ["x_rounded"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"]),
        ]
        x = "x_rounded"
    nodes.append(helper.make_node("MatMul", [x, w], ["y"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [side, side]) for n in ("x", "y")]
    held = [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    for tensor in held:
        if kind == "fp8" and tensor.data_type == TensorProto.INT8:  # E4M3's two NaN are odd
            tensor.data_type = TensorProto.FLOAT8E4M3FN
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _seconds(card: Card, trt: Any, file: Path) -> float:
    """Of one run of a plan, without copies to or from the host."""
    made = plan.read(trt, file, file.with_suffix(".compiled"))
    stream = card.stream()
    context = Context(made, 0, stream)
    context.shape({"x": made.profiles[0]["x"][1]})
    blocks = [card.block(size(made.kinds[name], context.output("y"))) for name in ("x", "y")]
    card.arena.reserve(made.activations_bytes)
    places = {name: block.address for name, block in zip(("x", "y"), blocks, strict=True)}
    context.place(places, card.arena)

    def run() -> None:
        context.enqueue(stream)
        stream.sync()

    seconds = _best(run)
    stream.close()
    return seconds


def _copied(card: Card) -> float:
    """GB/s of reading and writing the card's memory."""
    blocks = [card.block(_BYTES) for _ in range(2)]
    seconds = _best(lambda: card.copy(blocks[0].address, blocks[1].address, _BYTES))
    return 2 * _BYTES / seconds / 1e9


def _best(work: Callable[[], None]) -> float:
    return best_seconds(work, times=20)
