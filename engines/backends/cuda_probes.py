"""Probes: single matrix products that measure a card's peaks in ONNX Runtime.

Both matrices are inputs in the card's memory, and many products run between two looks at the clock.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edgevlm.engines.backends import Peaks, device_array
from edgevlm.engines.backends.cuda_sessions import Provider, open_session

FILE = "probe-product.onnx"
WIDTH, TALL = 4096, 4096
STREAMED = 65_536  # columns of the matrix that the memory probe reads: 512 MB
_TIMES = 20


def write(folder: Path) -> tuple[str, ...]:
    """Write the graph of a product in fp16; returns its name."""
    from onnx import TensorProto, helper

    sizes = {"x": ["rows", "width"], "w": ["width", "columns"], "y": ["rows", "columns"]}
    ports = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in sizes.items()
    }
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph([node], "probe", [ports["x"], ports["w"]], [ports["y"]])
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (folder / FILE).write_bytes(model.SerializeToString())
    return (FILE,)


def measure(
    folder: Path, provider: Provider, sizes: tuple[int, int, int] = (TALL, WIDTH, STREAMED)
) -> Peaks:
    """Arithmetic of tall products; memory rate of one row times a wide matrix.

    sizes: rows of the tall product, width of both, columns of the wide matrix.
    """
    session = open_session(folder / FILE, provider, 1, stateful=False).session
    tall, width, streamed = sizes
    work = 2 * tall * width * width / 1e9 / _seconds(session, provider, tall, width, width)
    gb = 2 * width * streamed / 1e9
    return Peaks(work, work, gb / _seconds(session, provider, 1, width, streamed))


def _seconds(session: Any, provider: Provider, rows: int, width: int, columns: int) -> float:
    """Of one product, the best of three series."""
    binding = session.io_binding()
    arrays = {
        name: device_array.zeros(shape, "fp16", provider.device)
        for name, shape in (
            ("x", (rows, width)),
            ("w", (width, columns)),
            ("y", (rows, columns)),
        )
    }
    for name in ("x", "w"):
        binding.bind_input(name, *arrays[name].bound())
    binding.bind_output("y", *arrays["y"].bound())
    session.run_with_iobinding(binding)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(_TIMES):
            session.run_with_iobinding(binding)
        best = min(best, (time.perf_counter() - begin) / _TIMES)
    return best
