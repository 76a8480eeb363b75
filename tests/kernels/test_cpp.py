"""Plugins in C++: against TensorRT's headers, asked all that TensorRT asks, and run on the host."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.backends.tensorrt import plugins
from edgevlm.engines.backends.tensorrt.flavours import RTX
from edgevlm.engines.lowering.lower import lower_component
from edgevlm.toolkit.ops import decompositions
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.target import Target
from tests.conftest import ROOT
from tests.kernels.conftest import headers
from tests.onnx_tools import model_of
from tests.ops_cases import CASES

SOURCES = ROOT / "engines/plugins/cpp"
HARNESS = ROOT / "tests/kernels/harness.cpp"
LIBRARY = "libedgevlm_plugins_host.so"
RELEASES = ("v10.3.0", "v11.1")


def made(release: str, cuda: Path, out: Path, *targets: str) -> str:
    """Run the plugins' Makefile; what it printed. Skips without headers or tools."""
    include = headers().get(release)
    if include is None:
        pytest.skip(f"TensorRT's headers of {release} are not here: make test-kernels fetches them")
    if not shutil.which("make") or not shutil.which("g++"):
        pytest.skip("there is no make or no g++")
    places = [f"TENSORRT={include}", f"CUDA={cuda}", f"OUT={out}"]
    command = ["make", "-s", "-C", str(SOURCES), *places, *targets]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=RELEASES)
def built(
    request: pytest.FixtureRequest, cuda: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the library for the host, and the harness, for one release."""
    out = tmp_path_factory.mktemp("cpp")
    made(request.param, cuda, out, "host")
    includes = ["-isystem", str(headers()[request.param]), "-isystem", str(cuda / "include")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *includes]
    command = ["g++", *flags, str(HARNESS), "-ldl", "-o", str(out / "harness")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def asked(
    built: Path,
    folder: Path,
    op: str,
    attributes: Mapping[str, int | float],
    inputs: Sequence[Array],
    outputs: int,
) -> tuple[list[Array], int]:
    """What a plugin makes of arrays; in how many places it wants float32 beside half."""
    lines = [f"op {op}"]
    for name, value in attributes.items():
        lines.append(f"{'real' if isinstance(value, float) else 'int'} {name} {value}")
    for index, array in enumerate(inputs):
        array.astype(np.float32).tofile(folder / f"in{index}")
        sizes = " ".join(map(str, array.shape))
        lines.append(f"input {folder / f'in{index}'} {sizes}")
    lines += [f"output {folder / f'out{index}'}" for index in range(outputs)]
    (folder / "job").write_text("\n".join(lines) + "\n")
    command = [str(built / "harness"), str(built / LIBRARY), str(folder / "job")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shapes = [[int(n) for n in s.split()] for s in re.findall(r"^output (.*)$", done.stdout, re.M)]
    beside = max(map(int, re.findall(r"beside others: (\d)", done.stdout)))
    arrays = [np.fromfile(folder / f"out{i}", np.float32).reshape(s) for i, s in enumerate(shapes)]
    return arrays, beside


def draw(*shape: int) -> Array:
    """Random numbers, others at every call."""
    return GENERATOR.normal(size=shape).astype(np.float32)


GENERATOR = np.random.default_rng(11)


def test_deformable_attention(built: Path, tmp_path: Path) -> None:
    sizes = {"num_heads": 2, "num_points": 2, "head_dim": 5, "levels": 3, "height": 3, "width": 4}
    inputs = [draw(2, 36, 10), 2 * draw(2, 7, 24), draw(2, 7, 12), GENERATOR.random((7, 2))]
    inputs[1][0, 0, :2] = 1e9, -1e9
    (found,), beside = asked(built, tmp_path, "MSDeformAttn", sizes, inputs, 1)
    expected = NumpyOps().ms_deform_attn(
        *inputs[:3],
        grid=(3, 4),
        num_levels=3,
        num_heads=2,
        num_points=2,
        head_dim=5,
        reference=inputs[3].astype(np.float32),
    )
    np.testing.assert_allclose(found, expected, atol=3e-6)
    assert beside == 1


def test_merge_of_levels(built: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"levels": 3, "hidden_size": 40, "output_size": 6, "epsilon": 1e-5}
    inputs = [draw(2, 5, 120) + 8, draw(3, 40), draw(3, 40), draw(3), draw(120, 6), draw(3, 6)]
    (found,), beside = asked(built, tmp_path, "LayerMerge", sizes, inputs, 1)
    names = ("norm.weight", "norm.bias", "scale", "linear.weight", "linear.bias")
    weights = Weights(dict(zip(names, inputs[1:], strict=True)))
    levels = np.split(inputs[0], 3, axis=2)
    expected = decompositions.layer_merge(NumpyOps(), levels, weights, 1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert beside == 0


def test_rotation(built: Path, tmp_path: Path) -> None:
    inputs = [draw(2, 5, 24), draw(2, 5, 24), 100 * draw(5, 4)]
    sizes = {"num_heads": 3, "head_dim": 8}
    found, beside = asked(built, tmp_path, "RotateHeads", sizes, inputs, 2)
    cos, sin = np.cos(inputs[2]), np.sin(inputs[2])
    for x, y in zip(inputs[:2], found, strict=True):
        a, b = np.split(x.reshape(2, 5, 3, 8).transpose(0, 2, 1, 3), 2, axis=-1)
        expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        np.testing.assert_allclose(y, expected, atol=1e-5)
    assert beside == 1


def test_the_library_needs_nothing_of_tensorrt(built: Path) -> None:
    command = ["nm", "-DC", "--undefined-only", str(built / LIBRARY)]
    wanted = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not re.search(r"nvinfer|createInfer|getPluginRegistry|cuda", wanted)


def test_kernels_compile_for_jetson_and_spill_nothing(cuda: Path, tmp_path: Path) -> None:
    if not (cuda / "bin/nvcc").exists():
        pytest.skip("the CUDA toolkit has no nvcc")
    said = made("v10.3.0", cuda, tmp_path, "all", "ARCHES=87")
    assert (tmp_path / "libedgevlm_plugins.so").exists()
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == 9
    assert max(spills) == 0
    assert max(registers) <= 64


RTX_SCRIPT = """
import json, sys
import tensorrt_rtx_bindings as trt
registry = trt.get_plugin_registry()
before = {c.name for c in registry.all_creators}
registry.load_library(sys.argv[1])
new = [c for c in registry.all_creators if c.name not in before]
print(json.dumps(sorted([c.name, c.plugin_version, c.plugin_namespace] for c in new)))
"""


needs_rtx = pytest.mark.skipif(
    not RTX.installed(), reason="TensorRT-RTX is not installed: make test-rtx"
)


@pytest.fixture(scope="module")
def library(cuda: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for the host against the newest headers, those of RTX's time."""
    out = tmp_path_factory.mktemp("newest")
    made("v11.1", cuda, out, "host")
    return out / LIBRARY


@needs_rtx
def test_nvidias_registry_loads_the_library(library: Path) -> None:
    """RTX has the registry of TensorRT 11, and only what stays clear of its builder is asked."""
    command = [sys.executable, "-c", RTX_SCRIPT, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr[-1000:]
    names = ("LayerMerge", "MSDeformAttn", "RotateHeads")
    assert json.loads(done.stdout) == [[name, "1", "edgevlm"] for name in names]


LOADED = """
import sys
import tensorrt_rtx_bindings as trt
from edgevlm.engines.backends import Plugin
from edgevlm.engines.backends.tensorrt import plugins
from edgevlm.toolkit.errors import TargetMismatch
from edgevlm.toolkit.target import Target
here = Target("tensorrt", (10, 3, 0), "sm_87")
known = [Plugin(n, n, "edgevlm", "1", True) for n in ("MSDeformAttn", "LayerMerge", "RotateHeads")]
plugins.load(trt, here, known)
plugins.load(trt, here, known)
try:
    plugins.load(trt, here, [Plugin("X", "X", "edgevlm", "1", True)])
except TargetMismatch as other:
    print("OTHER", other.message)
"""


@needs_rtx
def test_an_engine_finds_its_plugins_in_nvidias_registry(library: Path, tmp_path: Path) -> None:
    """As `run` loads them, from the folder that the command in `build`'s error fills."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        file = plugins.library_file(Target("tensorrt", (10, 3), "sm_87"))
        file.parent.mkdir(parents=True)
        shutil.copy(library, file)
        command = [sys.executable, "-c", LOADED]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("OTHER the engine needs the plugin edgevlm::X"), done.stderr


@needs_rtx
@pytest.mark.parametrize(
    ("case", "asked_for", "called"),
    [
        ("ms_deform_attn", "MSDeformAttn", "MSDeformAttn"),
        ("layer_merge", "LayerMerge", "LayerMerge"),
        ("attention_rotary", "RotaryAttention", "RotateHeads"),
    ],
)
def test_nvidias_parser_gives_the_call_to_the_plugin(
    case: str, asked_for: str, called: str, library: Path, tmp_path: Path
) -> None:
    """And takes the body where no such plugin is registered."""
    part, target = CASES[case], Target("tensorrt", (11, 4), "sm_90")
    model = model_of(part.component(), part.weights())
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(lower_component("c", model, target, [asked_for]).model.SerializeToString())
    command = [sys.executable, "-m", "tests.kernels.parsed", str(graph)]
    with_it = subprocess.run([*command, str(library)], capture_output=True, text=True).stdout
    assert f"SAID Found registered plugin: {called}. Importing this node as a plugin" in with_it
    assert f"SAID Successfully created plugin: {called}" in with_it
    assert "PARSED" not in with_it  # RTX ends here: no process that builds with it registers ours
    without = subprocess.run(command, capture_output=True, text=True).stdout
    assert "PARSED True" in without
    assert "PLUGIN" not in without.partition("PARSED")[2]
