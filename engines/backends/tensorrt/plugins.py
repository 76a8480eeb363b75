"""Fused plugins in an engine: registered for its build, and where it needs them for its runs.

From TensorRT 10.13 on a plugin is Python while an engine is built, and its kernel lies in the plan,
which runs anywhere. Before, plugins are a library of C++ that build and runs both load; it is made
once on the device, and kept in the user's cache folder. No path comes out of an engine: loading a
library runs what is in it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from edgevlm.engines.backends import Plugin
from edgevlm.toolkit.errors import BuildError, MissingExtra, TargetMismatch, UnsupportedError
from edgevlm.toolkit.target import Target, machine

if TYPE_CHECKING:
    import onnx

AHEAD_SINCE = (10, 13)  # plugins whose kernels are compiled ahead of time, into the plan
LIBRARY = "libedgevlm_plugins.so"
_LOADING = Lock()


def of_graph(model: onnx.ModelProto, target: Target) -> tuple[Plugin, ...]:
    """The plugins that a lowered graph calls, each once."""
    from edgevlm.engines.lowering.tensorrt_plugins import OPS

    found: dict[str, Plugin] = {}
    for node in _calls(model):
        own = {a.name: a.s.decode() for a in node.attribute if a.name.startswith("plugin_")}
        found[node.op_type] = Plugin(
            OPS[node.op_type],
            node.op_type,
            own["plugin_namespace"],
            own["plugin_version"],
            library=not compiled_ahead(target),
        )
    return tuple(found.values())


def _calls(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The calls of a graph that are for plugins."""
    nodes = model.graph.node
    return [n for n in nodes if any(a.name == "plugin_namespace" for a in n.attribute)]


def compiled_ahead(target: Target) -> bool:
    """Whether a release has plugins whose kernels lie in the plan; () is the newest."""
    return not target.version or target.version >= AHEAD_SINCE


# -- to build ---------------------------------------------------------------------------------


def check_builds(target: Target) -> None:
    """Raise what is missing to build plugins for `target` on this machine.

    MissingExtra without Triton, UnsupportedError for a card without kernels of ours, BuildError
    without the library, with the command that makes it.
    """
    from edgevlm.engines.plugins.compile import PTX_ISA

    if not compiled_ahead(target):
        _require_library(target)
        return
    if _sm(target) not in PTX_ISA:
        raise UnsupportedError(
            f"there are no fused kernels for {target.arch}",
            hint=f"there are for {', '.join(f'sm_{sm}' for sm in PTX_ISA)}: leave --plugins out",
        )
    if find_spec("triton") is None:
        raise MissingExtra("triton", "kernels", purpose="compiling plugins")


def to_register(plugins: Sequence[Plugin], target: Target) -> dict[str, Any]:
    """What worker.py registers before it parses; {} for no plugins. Raises as check_builds."""
    if not plugins:
        return {}
    check_builds(target)
    if not compiled_ahead(target):
        return {"library": str(library_file(target)), "folders": [], "sm": 0}
    from edgevlm.engines.plugins.catalogue import FOLDERS

    folders = [FOLDERS[plugin.op] for plugin in plugins]
    return {"library": "", "folders": folders, "sm": _sm(target)}


def check_taken(component: str, model: onnx.ModelProto, taken: int) -> None:
    """Raise BuildError unless as many plugins are in the network as calls of a graph want one.

    A function's body is in the graph too, which the parser takes without a word.
    """
    wanted = [node.op_type for node in _calls(model)]
    if len(wanted) != taken:
        raise BuildError(
            f"{component}: TensorRT took {taken} plugins for {len(wanted)} calls "
            f"({', '.join(sorted(set(wanted)))}), and their bodies for the others",
            hint="build without --plugins, and please report this with edgevlm doctor",
        )


def _sm(target: Target) -> int:
    """87 of sm_87; 0 for what is no card."""
    number = target.arch.removeprefix("sm_")
    return int(number) if number.isdigit() else 0


# -- to run -----------------------------------------------------------------------------------


def load(trt: Any, here: Target, plugins: Sequence[Plugin]) -> None:
    """Make the plugins known that an engine needs beside it, in this process, once.

    Raises BuildError where the library is not here, TargetMismatch where it is another one.
    """
    needed = [plugin for plugin in plugins if plugin.library]
    if not needed:
        return
    file = _require_library(here)
    with _LOADING:  # components are opened in several threads
        registry = _loaded(trt, str(file))
    for plugin in needed:
        if registry.get_creator(plugin.name, plugin.version, plugin.namespace) is None:
            raise TargetMismatch(
                f"the engine needs the plugin {plugin.namespace}::{plugin.name}, version "
                f"{plugin.version}, which {file} has not",
                hint=f"make it again: {make_command(here)}",
            )


@cache
def _loaded(trt: Any, file: str) -> Any:
    """The registry with the plugins of a library; loading one twice would register them twice."""
    registry = trt.get_plugin_registry()
    registry.load_library(file)
    return registry


def library_file(target: Target) -> Path:
    """Where the library for a release and card is kept, in the user's cache folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    release = ".".join(map(str, target.version[:2]))
    return root / "edgevlm" / "plugins" / f"tensorrt-{release}-{target.arch}" / LIBRARY


def make_command(target: Target) -> str:
    """The command that makes the library, on the device; its compiler comes with CUDA."""
    from edgevlm.engines import plugins

    sources = Path(plugins.__path__[0]) / "cpp"
    headers = f"TENSORRT=/usr/include/{machine()}-linux-gnu"
    places = [f"OUT={library_file(target).parent}", headers, f"ARCHES={_sm(target)}"]
    return shlex.join(["make", "-C", str(sources), *places])


def _require_library(target: Target) -> Path:
    file = library_file(target)
    if not file.exists():
        raise BuildError(
            f"TensorRT before 10.13 takes plugins from a library, and {file} is not here",
            hint=f"make it on this device: {make_command(target)}",
        )
    return file
