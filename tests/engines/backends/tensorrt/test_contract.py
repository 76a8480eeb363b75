"""Every name of TensorRT and cuda-core that our code uses exists in every release, and takes what
it is given. The facts are in tests/goldens/tensorrt_api, written by api_extract.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engines.backends.tensorrt import api
from tests.engines.backends.tensorrt.api import CUDA, Api

SOURCES = sorted((ROOT / "engines/backends/tensorrt").glob("*.py"))
# What a variable or an attribute of such a name holds, in our code.
HOLDS: dict[str, str | None] = {
    **dict.fromkeys(("trt", "_core", "core"), ""),
    **{"builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser"},
    **{"config": "IBuilderConfig", "profile": "IOptimizationProfile", "error": "ParserError"},
    **{"runtime": "Runtime", "engine": "ICudaEngine", "_context": "IExecutionContext"},
    **{"registry": "IPluginRegistry"},
}
HOLDS_IN: dict[str, dict[str, str | None]] = {
    "jit.py": {"config": "IRuntimeConfig", "made": "IRuntimeConfig", "cache": "IRuntimeCache"},
    "worker.py": {"cache": "ITimingCache", "layer": "ILayer"},
    "call.py": {"_context": None, "builder": "GraphBuilder", "_graph": "Graph", "stream": "Stream"},
    "card.py": {"_stream": "Stream", "_buffer": "Buffer", "buffer": "Buffer"},
    "context.py": {"stream": "Stream"},
    "refit.py": {"parser": "OnnxParserRefitter", "refitter": "Refitter"},
    "builder.py": {"builder": None, "profile": None, "config": None, "error": None},
    "__init__.py": {"builder": None},
    "probes.py": {"builder": None, "stream": "Stream"},
}
# Names that only some releases have; the code asks for them first, or runs in those alone.
ONLY = {
    "Runtime.get_engine_validity": "rtx-",
    "IExecutionContext.is_stream_capturable": "rtx-",
    "IBuilderConfig.num_compute_capabilities": "rtx-",
    "IBuilderConfig.set_compute_capability": "rtx-",
    "ComputeCapability": "rtx-",
    "EngineInvalidityDiagnostics": "rtx-",
    "IRuntimeCache": "rtx-",
    "ICudaEngine.create_runtime_config": "rtx-",
    **{f"IRuntimeConfig.{n}": "rtx-" for n in (
        "set_execution_context_allocation_strategy", "create_runtime_cache",
        "set_runtime_cache", "get_runtime_cache")},
    **{f"IRuntimeCache.{n}": "rtx-" for n in ("serialize", "deserialize")},
}  # fmt: skip


class Use:
    """One attribute that our code reads or sets, or a call of it."""

    def __init__(self, path: Path, node: ast.Attribute, owner: str) -> None:
        self.where = f"{path.name}:{node.lineno}"
        self.owner, self.name = owner, node.attr
        self.call: ast.Call | None = None

    def check(self, known: Api) -> None:
        full = f"{self.owner}.{self.name}" if self.owner else self.name
        if full == "ILayer.attention":  # worker.py casts to this class, where it exists
            cast = "IAttentionInputLayer"
            assert cast not in known.facts or known.find(cast, "attention")
            return
        if not known.release.startswith(ONLY.get(full, "")):
            return
        if not self.owner:  # of the module
            if self.name != "__version__":
                assert full in known.facts, f"{self.where}: {known.release} has no {full}"
            if self.call is not None and known.find(full, "__init__"):
                self._check_call(known, full, "__init__")
            return
        assert known.find(self.owner, self.name), f"{self.where}: {known.release} has no {full}"
        if self.call is not None:
            self._check_call(known, self.owner, self.name)

    def _check_call(self, known: Api, owner: str, name: str) -> None:
        assert self.call is not None
        given = self.call.args
        if any(isinstance(arg, ast.Starred) for arg in given):
            return
        keywords = [word.arg for word in self.call.keywords if word.arg]
        known.check_call(owner, name, len(given), keywords)


def uses() -> Iterator[Use]:
    for path in SOURCES:
        holds = HOLDS | HOLDS_IN.get(path.name, {})
        tree = ast.parse(path.read_text())
        calls = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            owner = _owner(node.value, holds)
            if owner is None or node.attr.startswith("_") and node.attr != "__version__":
                continue
            use = Use(path, node, owner)
            use.call = calls.get(id(node))
            yield use


def _owner(value: ast.expr, holds: dict[str, str | None]) -> str | None:
    """The class of an expression: "" for a module, None if it is none of TensorRT's."""
    if isinstance(value, ast.Name):
        return holds.get(value.id)
    if not isinstance(value, ast.Attribute):
        return None
    if _owner(value.value, holds) == "":
        return value.attr  # trt.TensorIOMode.INPUT
    return holds.get(value.attr) if value.attr in holds else None


USES = [use for use in uses() if use.where.split(":")[0] != "__main__.py"]
CUDA_CLASSES = ("Stream", "Buffer", "GraphBuilder", "Graph", "Device", "LegacyPinnedMemoryResource")


def of_cuda(use: Use) -> bool:
    return use.owner in CUDA_CLASSES or (not use.owner and use.name in CUDA_CLASSES)


@pytest.mark.parametrize("release", api.releases())
def test_every_name_and_call_exists_in_every_release(release: str) -> None:
    known = api.of(release)
    checked = [use for use in USES if not of_cuda(use)]
    assert len(checked) > 60
    for use in checked:
        use.check(known)


def test_every_name_and_call_of_cuda_core_exists() -> None:
    known = api.of(CUDA)
    checked = [use for use in USES if of_cuda(use)]
    assert len(checked) > 15
    for use in checked:
        use.check(known)


@pytest.mark.parametrize(
    ("text", "release", "odd"),
    [
        ("trt.BuilderFlag.FP16", "11.4.0.106", AssertionError),
        ("trt.IInt8Calibrator", "11.4.0.106", AssertionError),
        ("engine.device_memory_size", "11.4.0.106", AssertionError),
        ("engine.get_tensor_name()", "10.3.0", TypeError),
        ("_context.set_input_shape(a, b, c)", "10.16.1.11", TypeError),
        ("config.set_timing_cache(a, mismatch=b)", "10.16.1.11", TypeError),
        ("stream.synchronize()", CUDA, AssertionError),
    ],
)
def test_what_a_release_lacks_is_found(text: str, release: str, odd: type[Exception]) -> None:
    tree = ast.parse(text)
    call = next((n for n in ast.walk(tree) if isinstance(n, ast.Call)), None)
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    owner = _owner(node.value, HOLDS | {"stream": "Stream"})
    assert owner is not None
    use = Use(Path("some.py"), node, owner)
    use.call = call
    with pytest.raises(odd):
        use.check(api.of(release))


def test_the_facts_are_those_of_the_present_code() -> None:
    """api_extract.py ran after the last name was used: what is checked is in the file."""
    file = {name for release in (*api.releases(), CUDA) for name in api.of(release).facts}
    used = {f"{use.owner}.{use.name}".strip(".") for use in USES}
    assert used - file == {"__version__", "ILayer.attention"}
