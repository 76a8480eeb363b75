"""NVIDIA's own Python of plugins, out of its wheels, takes ours and gets what it can launch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgevlm.engines.lowering.lower import lower_component
from edgevlm.toolkit.target import Target
from tests.kernels.conftest import FETCHED
from tests.kernels.stand_in import SHAPES
from tests.onnx_tools import model_of
from tests.ops_cases import CASES

RELEASES = ("10.13.3.9", "11.4.0.106")
OUTPUTS = {
    "MSDeformAttn": [[2, 35, 24]],
    "LayerMerge": [[2, 65, 200]],
    "RotateHeads": [[2, 6, 37, 8], [2, 6, 37, 8]],
}
GRIDS = {
    ("MSDeformAttn", "fp32"): 2 * 5 * 3,  # images, blocks of queries, heads
    ("MSDeformAttn", "fp16"): 2 * 3 * 3,
    ("LayerMerge", "fp32"): 3 * 4,  # blocks of tokens, blocks of outputs
    ("LayerMerge", "fp16"): 3 * 2,
    ("RotateHeads", "fp32"): 2 * 3 * 3,  # images, blocks of tokens, groups of heads
    ("RotateHeads", "fp16"): 2 * 3 * 3,
}
SCALARS = {"MSDeformAttn": 35, "LayerMerge": 130, "RotateHeads": 37}
PARAMETERS = {"MSDeformAttn": 6, "LayerMerge": 8, "RotateHeads": 6}
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


def attributes_of_call(called: str) -> list[str]:
    """Those of a lowered call; the parser hands those that a creator names."""
    cases = {"MSDeformAttn": "ms_deform_attn", "LayerMerge": "layer_merge"}
    part = CASES[cases.get(called, "attention_rotary")]
    model, target = model_of(part.component(), part.weights()), Target("tensorrt", (11, 4), "sm_87")
    plugins = [called if called in cases else "RotaryAttention"]
    nodes = lower_component("c", model, target, plugins).model.graph.node
    (call,) = (node for node in nodes if node.op_type == called)
    return sorted(a.name for a in call.attribute if not a.name.startswith("plugin_"))


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.usefixtures("triton", "triton_cache")
def test_nvidias_python_takes_our_plugins(release: str, tmp_path: Path) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted(FETCHED.glob(f"tensorrt_cu13_bindings-{release}-{python}-*.whl"))
    if not wheels:
        pytest.skip(f"TensorRT {release}'s bindings are not in {FETCHED}: make test-kernels")
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc, which makes the stand-ins of TensorRT's libraries")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.stand_in", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["release"] == release
    assert len(told["found"]) == 9
    for name, said in told["found"].items():
        op, dtype = name.split(", ")
        assert sorted(said["attributes"]) == attributes_of_call(op)
        for key, value in SHAPES[op][1].items():
            assert said["attributes"][key] == pytest.approx(value)
        assert said["outputs"] == OUTPUTS[op]
        assert set(said["types"]) == {TYPES[dtype]}
        wide = "fp32" if dtype == "fp32" else "fp16"
        assert said["grid"] == [GRIDS[op, wide], 1, 1]
        assert said["block"] in (128, 256)
        assert said["shared"] <= 48 * 1024
        assert said["extra"] == [SCALARS[op]]
        assert said["parameters"] == PARAMETERS[op]
        for combination in said["combinations"]:
            assert len(set(combination) - {"FP32"}) <= 1
