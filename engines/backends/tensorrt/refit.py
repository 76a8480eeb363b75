"""Plans without weights: these lie beside the plan, and go into it when it is opened.

Two profiles of a language model store its float weights twice in a plan, and once in a file, which
is the bundle's own where nothing has to be changed: engines share its blocks where the file system
can.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.errors import BuildError, OutOfMemory, ToolkitError, UnsupportedError
from edgevlm.toolkit.target import Target

_NO_MEMORY = ("out of memory", "OutOfMemory")


def check_builds(target: Target, here: Target) -> None:
    """Raise UnsupportedError where TensorRT-RTX would build for a card that is not here."""
    if target.backend == "tensorrt-rtx" and not target.holds(here.arch):
        raise UnsupportedError(
            f"TensorRT-RTX strips plans of their weights only where there is a card ({target})",
            hint="build without --strip-weights, or on the machine with the card",
        )


def graph_of(folder: Path, record: ComponentRecord) -> Path | None:
    """The graph whose weights a component's plan lacks; None where the plan has them."""
    if record.weights == record.graph:
        return None
    return (folder / record.weights).with_suffix(".onnx")


def refit(trt: Any, engine: Any, graph: Path, log: Any) -> float:
    """Put the weights of a graph into the engine that was made of it; milliseconds.

    Raises BuildError where they are not those of the build, or OutOfMemory.
    """
    start, since = time.perf_counter(), log.count
    refitter = trt.Refitter(engine, log)
    if not refitter.get_all_weights():
        raise _failed(graph, "the plan takes no weights: the builder took the model for a constant")
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(graph)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise _failed(graph, *errors, *log.since(since))
    missing = refitter.get_missing_weights()
    if missing:
        raise _failed(graph, f"{len(missing)} weights are missing, {missing[0]} among them")
    if not refitter.refit_cuda_engine():
        raise _failed(graph, *log.since(since))
    return 1000 * (time.perf_counter() - start)


def _failed(graph: Path, *reasons: str) -> ToolkitError:
    first = next(iter(reasons), "no reason given")
    what = f"TensorRT cannot put the weights of {graph.name} into their plan: {first[:300]}"
    if any(word in reason for reason in reasons for word in _NO_MEMORY):
        return OutOfMemory(what, hint="end other programs that use the card")
    return BuildError(what)
