"""Whom NVIDIA's parser gives a call: python -m tests.kernels.parsed GRAPH [LIBRARY].

A process of its own: TensorRT-RTX ends it once its parser has made a plugin. Prints the parser's
words about plugins as they come, and then the kinds of layers, if it gets so far.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main(graph: str, library: str | None) -> None:
    """Parse a graph, with or without the library's plugins."""
    trt: Any = import_module("tensorrt_rtx_bindings")

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, text: str) -> None:
            if "lugin" in text:
                print(f"SAID {text}", flush=True)

    logger = Logger()
    if library:
        trt.get_plugin_registry().load_library(library)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(Path(graph).read_bytes())
    kinds = sorted({network.get_layer(i).type.name for i in range(network.num_layers)})
    print("PARSED", parsed, *kinds, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
