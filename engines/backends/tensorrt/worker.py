"""Builds one plan in a process of its own: TensorRT keeps the first logger that it was given, and
what it aborts on takes the process with it.

    python -m edgevlm.engines.backends.tensorrt.worker JOB.json

reads a job (builder.Job as JSON) and writes its results beside it: `result.json`, `build.log` and
the plan. The exit status is 0 if there is a plan.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

_LAYER_CLASSES = {"ATTENTION_INPUT": "IAttentionInputLayer"}
_PLUGINS = ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")  # kinds of layers


def main(job_file: Path) -> int:
    """Build what a job describes; the exit status."""
    folder = job_file.parent
    job = json.loads(job_file.read_text())
    trt = import_module(job["module"])
    with (folder / "build.log").open("w", buffering=1) as log:
        result = _build(trt, job, _logger(trt, log), folder)
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (folder / "result.json").write_text(json.dumps(result))
    return 0 if result["plan_bytes"] else 1


def _logger(trt: Any, log: TextIO) -> Any:
    """One that writes a line for all that TensorRT says, severity first."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, text: str) -> None:
            log.write(f"{severity.name} {text}\n")

    return Logger()


def _build(trt: Any, job: dict[str, Any], logger: Any, folder: Path) -> dict[str, Any]:
    """Parse and build; what builder.report reads. `parsed` false, or plan_bytes 0: there is none.

    parse_s, build_s: seconds. plan_bytes: of the plan, written to job["plan"].
    """
    if job["plugins"]:
        _register(trt, **job["plugins"])
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    graph = Path(job["graph"])
    start = time.perf_counter()
    parsed = parser.parse(graph.read_bytes(), str(graph))
    errors = [_error(parser.get_error(i)) for i in range(parser.num_errors)]
    result = {
        "parsed": parsed,
        "parse_s": time.perf_counter() - start,
        "errors": errors,
        "layers": network.num_layers,
        "plugins": sum(_layer_kind(network, i) in _PLUGINS for i in range(network.num_layers)),
        "plan_bytes": 0,
        "stripped": job["strip"],
        "release": trt.__version__,
    }
    if not parsed:
        return result
    _let_attention_decompose(trt, network)
    config = _config(trt, builder, job)
    _add_profiles(trt, builder, config, network, job["profiles"])
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    result["build_s"] = time.perf_counter() - start
    if job["timing_cache"]:
        _keep_timings(config, Path(job["timing_cache"]))
    if plan is not None:
        Path(job["plan"]).write_bytes(plan)
        result["plan_bytes"] = plan.nbytes
    return result


def _register(trt: Any, library: str, folders: list[str], sm: int) -> None:
    """Let the parser find plugins: those of a library, or ours whose kernels go into the plan."""
    if library:
        registry = trt.get_plugin_registry()
        registry.load_library(library)
    if folders:
        from edgevlm.engines.plugins import aot

        aot.define(folders, sm)


def _layer_kind(network: Any, index: int) -> str:
    """A name of trt.LayerType."""
    layer = network.get_layer(index)
    return str(layer.type.name)


def _network_flags(trt: Any) -> int:
    """Strong typing: from TensorRT 11 on there is nothing else, and the flag is ignored."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _error(error: Any) -> str:
    """What a parser says, and of which node; its second line is of the missing driver."""
    first = error.desc().splitlines()[0] if error.desc() else error.code().name
    node = error.node_name() if hasattr(error, "node_name") else ""
    return f"{node}: {first}" if node else first


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Where there is no kernel for an attention, simpler ones run. Costs nothing where there is."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        name = _LAYER_CLASSES.get(layer.type.name)
        if name is not None:
            layer.__class__ = getattr(trt, name)  # the bindings hand out plain ILayer
            layer.attention.decomposable = True


def _config(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    """The builder's options: kernels listed, memory, cards, what was timed, weights left out."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
        for index, name in enumerate(job["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if job["timing_cache"]:
        _set_timings(config, Path(job["timing_cache"]))
    if job["strip"]:  # the weights that come back are the same, so that the builder may use them
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    return config


def _set_timings(config: Any, file: Path) -> None:
    """Start from what was timed before, or from nothing where TensorRT does not take that."""
    known = file.read_bytes() if file.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _keep_timings(config: Any, file: Path) -> None:
    """Keep what was timed, whole or not at all; without a folder to write in, nothing."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(cache.serialize())
        part.replace(file)


def _add_profiles(
    trt: Any, builder: Any, config: Any, network: Any, profiles: list[dict[str, list[list[int]]]]
) -> None:
    """profiles: for each the smallest, usual and largest shape of every input that changes."""
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
