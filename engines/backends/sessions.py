"""Makes every ONNX Runtime session: of engines, probes, `--bisect` and tests.

On x86 without VNNI, ONNX Runtime's products of U8 activations and S8 weights saturate: a layer in 8
bits would be wrong by half of its largest value. `session.x64quantprecision` makes it convert such
weights to U8, whose products are exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.toolkit.quantization import static
from edgevlm.toolkit.target import load_onnxruntime, saturates_int8

_EXACT_PRODUCTS = "session.x64quantprecision"
# Merges the Q/DQ of layers with one input; a product is of integers only if it has its own.
_MERGING = "CommonSubexpressionElimination"
# What takes FP8 for integers: the first makes MatMulIntegerToFloat of its products and refuses the
# graph then; the others drop a Relu or Clip in front of QuantizeLinear, as if codes began at 0.
_OF_INTEGERS = ("QDQSelectorActionTransformer", "ReluQuantRewrite", "ClipQuantRewrite")
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ERRORS_ONLY = 3


def session_options(threads: int = 0) -> Any:
    """onnxruntime.SessionOptions that are right on this processor; threads: 0 for all."""
    options = load_onnxruntime().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    if saturates_int8():
        options.add_session_config_entry(_EXACT_PRODUCTS, "1")
    return options


def open_session(
    model: Path | str | bytes, options: Any | None = None, provider: Any = "CPUExecutionProvider"
) -> Any:
    """A session of a graph's file or of its bytes, on the processor or where `provider` says.

    provider: a name, or a pair of it and its options. Raises what ONNX Runtime raises if it cannot
    load the graph.
    """
    graph = model if isinstance(model, bytes) else Path(model).read_bytes()
    return load_onnxruntime().InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options or session_options(),
        providers=[provider],
        disabled_optimizers=_disabled(graph),
        # A failure is told as it is: not printed on stdout, and not tried again elsewhere.
        enable_fallback=0,
        read_config_from_model=0,
    )


def _disabled(graph: bytes) -> list[str] | None:
    marks = {(_MERGING,): static.SUFFIX, _OF_INTEGERS: static.zero_name("fp8")}
    found = [name for names, mark in marks.items() if mark.encode() in graph for name in names]
    return found or None


def read_weights_from(options: Any, folder: Path) -> Any:
    """The same options for a graph given as bytes whose weights are files of `folder`."""
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
    return options


def keep_graph(options: Any) -> None:
    """Let ONNX Runtime run the graph as it is, without rewriting it."""
    levels = load_onnxruntime().GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL
