"""Kernels of our own in an engine for this processor: calls of them in a second graph.

A component has both graphs over one weights file, and the one without our kernels runs wherever
they cannot be made, are switched off, or are refused by ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.engines.backends import Compiled, Plugin, RunnerOptions, sessions
from edgevlm.engines.native.library import DOMAIN, native
from edgevlm.toolkit.bundle.manifest import ComponentRecord

ATTENTION = Plugin("Attention", "RoundedAttention", DOMAIN, "1", library=True)
CACHED = Plugin("CachedAttention", "CachedAttention", DOMAIN, "1", library=True)
UPCAST = Plugin("MatMul", "UpcastMatMul", DOMAIN, "1", library=True)
ROWS = Plugin("RowQuantize", "RoundRows", DOMAIN, "1", library=True)
PRODUCTS = Plugin("RowQuantizedLinear", "RoundedProduct", DOMAIN, "1", library=True)


def second_graph(graph: str) -> str:
    """The file with calls of our kernels, beside the one of a component: encoder.native.onnx."""
    return f"{graph.removesuffix('.onnx')}.native.onnx"


def is_ours(plugin: Plugin) -> bool:
    """Whether it is a kernel for processors, and none of TensorRT's plugins."""
    return plugin.namespace == DOMAIN


def forms(component: Compiled, folder: Path) -> list[Compiled]:
    """The component as it runs, and where that is with our kernels, as it runs without them too."""
    if not any(map(is_ours, component.plugins)):
        return [component]
    plain = replace(component, plugins=())
    if not (folder / second_graph(component.record.graph)).exists():
        return [plain]
    return [plain, component]


def open_session(
    folder: Path, record: ComponentRecord, options: RunnerOptions, settings: Any
) -> Any:
    """A session of a component: with our kernels where its engine has calls of them and they can
    be had here. Raises what ONNX Runtime raises if it cannot load the other graph.
    """
    graph = folder / second_graph(record.graph)
    if any(map(is_ours, options.plugins)) and graph.exists():
        session = _with_kernels(graph, settings)
        if session is not None:
            return session
    return sessions.open_session(folder / record.graph, settings)


def _with_kernels(graph: Path, settings: Any) -> Any | None:
    """A session of this graph, None where there is no library or it is refused."""
    library = native()
    if library.path is None:
        return None
    try:
        settings.register_custom_ops_library(str(library.path))
        return sessions.open_session(graph, settings)
    except Exception:  # ONNX Runtime raises many types of its own; the other graph says why
        return None
