"""Makes every session on a card, all options in one place, and checks that it runs there.

ONNX Runtime falls back to the processor without an error: whole sessions where a library of CUDA is
missing, and single ops where a kernel is. Its own switch against that refuses the arithmetic on
shapes too, which belongs on the processor; so what it says of each node's place is read instead.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from edgevlm.engines.backends import sessions
from edgevlm.engines.backends.device_array import Device
from edgevlm.toolkit.errors import BuildError, OutOfMemory, UnsupportedError
from edgevlm.toolkit.target import load_onnxruntime

_RECORD = "session.record_ep_graph_assignment_info"
_GRAPH_ID = "gpu_graph_id"
_NEVER = -1  # as the number of a CUDA graph: run without one
FLOATS = "edgevlm.float_nodes"  # metadata of a graph: the names of nodes that make floats
# What ONNX Runtime computes of shapes on the processor by choice; of floats it must not.
_OF_SHAPES = frozenset(
    "Add Cast Concat Div Expand Gather Max Mul Range Reshape Shape Slice Squeeze Sub Unsqueeze "
    "Where".split()
)
_LOADING = Lock()
_NO_GRAPH = ("graph capture", "cuda graph", "CUDA graph", "CUDA Graph")
_OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Provider:
    """Who executes a session. name, options: ONNX Runtime's. device: where its memory is.
    captures: whether calls of fixed shapes become CUDA graphs.
    """

    name: str
    device: Device
    options: Mapping[str, str] = field(default_factory=dict)
    captures: bool = False


CUDA = Provider(
    "CUDAExecutionProvider",
    Device("cuda"),
    {
        "device_id": "0",
        # Sums of fp16 in fp32, where ONNX Runtime joins an addition and the norm behind it.
        "enable_skip_layer_norm_strict_mode": "1",
        # By default an arena doubles: half of a card may be held and never used.
        "arena_extend_strategy": "kSameAsRequested",
        # fp32 means fp32: TF32 has 10 bits of mantissa, beyond the tolerance of the goldens.
        "use_tf32": "0",
        # The default times every algorithm of every new shape of an image.
        "cudnn_conv_algo_search": "HEURISTIC",
    },
    captures=True,
)


@dataclass(frozen=True)
class Opened:
    """A session, and whether it captures CUDA graphs."""

    session: Any
    captures: bool


def open_session(file: Path, provider: Provider, context: int, *, stateful: bool) -> Opened:
    """The graph of `file` on a card. context: positions of the KV cache, which shapes are fixed to.

    stateful: whether single tokens are decoded, whose shapes repeat. Raises BuildError,
    UnsupportedError or OutOfMemory.
    """
    _preload()
    capture = provider.captures and stateful
    while True:
        try:
            session = _session(file, provider, context, capture=capture)
            break
        except Exception as refused:  # ONNX Runtime raises many types of its own
            if capture and any(word in str(refused) for word in _NO_GRAPH):
                capture = False  # a copy that no CUDA graph can hold: slower, and as right
                continue
            raise failed(f"ONNX Runtime cannot load {file.name}", refused) from None
    check_placement(session, provider, file.stem)
    return Opened(session, capture)


def _session(file: Path, provider: Provider, context: int, *, capture: bool) -> Any:
    settings = sessions.session_options(1)  # the processor only launches kernels
    settings.add_session_config_entry(_RECORD, "1")
    settings.add_free_dimension_override_by_name("context", context)
    options = dict(provider.options) | ({"enable_cuda_graph": "1"} if capture else {})
    return sessions.open_session(file, settings, (provider.name, options))


def _preload() -> None:
    """Load CUDA's libraries that came as Python packages; it prints what it does not find, which
    the session's own error says better.
    """
    onnxruntime = load_onnxruntime("onnxruntime-gpu", "gpu", "running on a card")
    if hasattr(onnxruntime, "preload_dlls"):
        # Components are opened in several threads, and stdout is one for all of them.
        with _LOADING, contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def check_placement(session: Any, provider: Provider, name: str) -> None:
    """Raise BuildError naming every op that runs elsewhere than on the provider's device, and
    UnsupportedError where ONNX Runtime is too old to tell.
    """
    if session.get_providers()[0] != provider.name:
        raise BuildError(
            f"{name}: ONNX Runtime could not start {provider.name} and would run on the processor",
            hint="install CUDA: pip install 'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas",
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise UnsupportedError(
            f"{name}: this ONNX Runtime cannot say where its ops run",
            hint="pip install -U 'onnxruntime-gpu>=1.24', which needs Python 3.11 or newer",
        )
    floats = set(session.get_modelmeta().custom_metadata_map.get(FLOATS, "").split("\n"))
    elsewhere = sorted(
        f"{node.name} ({node.op_type})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider.name
        for node in part.get_nodes()
        if node.op_type not in _OF_SHAPES or node.name in floats
    )
    if elsewhere:
        more = f" and {len(elsewhere) - 5} others" if len(elsewhere) > 5 else ""
        raise BuildError(
            f"{name}: {', '.join(elsewhere[:5])}{more} would run on the processor: "
            f"{provider.name} of this release has no kernel for it",
            hint="please report this with the output of edgevlm doctor",
        )


def run_options(graph: int | None) -> Any:
    """onnxruntime.RunOptions of calls that share one CUDA graph; None for calls without one."""
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry(_GRAPH_ID, str(_NEVER if graph is None else graph))
    return options


def failed(what: str, reason: Exception) -> BuildError | OutOfMemory:
    """The error for what ONNX Runtime raised."""
    text = str(reason)
    if any(words in text for words in _OUT_OF_MEMORY):
        return OutOfMemory(
            f"{what}: the card's memory is full",
            hint="build with --precision int4, with a smaller --max-context, or with "
            "--max-image-tiles",
        )
    return BuildError(
        f"{what}: {text}", hint="if the engine was changed since it was built, build it again"
    )
