"""What plugins must move, and what of them needs neither Triton nor TensorRT."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest

from edgevlm.engines.lowering.tensorrt_plugins import PLUGINS
from edgevlm.engines.plugins import aot
from edgevlm.engines.plugins.__main__ import main
from edgevlm.engines.plugins.catalogue import FOLDERS, SITES
from edgevlm.engines.plugins.compile import PTX_ISA, Launch, without_scratch
from edgevlm.toolkit.errors import BuildError, MissingExtra, UnsupportedError
from edgevlm.toolkit.target import DEVICES
from tests.conftest import ROOT

PTX = """
.visible .entry turn(
\t.param .u64 .ptr .global .align 16 turn_param_0,
\t.param .u32 turn_param_1,
\t.param .u64 .ptr .global .align 1 turn_param_2
)
.reqntid 128
{
\tld.param.b64 \t%rd1, [turn_param_0];
\tld.param.b32 \t%r1, [turn_param_1];
}
"""


def test_every_op_with_a_plugin_has_a_folder_a_row_and_a_site() -> None:
    assert {f"edgevlm.{op}" for op in FOLDERS} == set(PLUGINS)
    assert {site.op for site in SITES} == set(FOLDERS)
    for folder in FOLDERS.values():
        names = {path.name for path in (ROOT / "engines/plugins" / folder).iterdir()}
        assert names >= {"kernel.py", "kernel.cu", "math.h", "plugin.h", "plugin.py", "spec.py"}


def test_there_is_ptx_for_every_card_that_tensorrt_builds_for() -> None:
    cards = {d.target.arch for d in DEVICES.values() if d.target.backend == "tensorrt"}
    assert cards <= {f"sm_{sm}" for sm in PTX_ISA}


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_floors_count_each_tensor_once(site: object) -> None:
    assert isinstance(site, type(SITES[0]))
    half, whole = site.work("fp16"), site.work("fp32")
    assert half.floor_bytes <= half.plugin_bytes
    assert half.floor_bytes < half.body_bytes
    assert half.flops == whole.flops
    assert 1.9 < whole.floor_bytes / half.floor_bytes <= 2
    assert half.floor_s(2e11, 1e15) == pytest.approx(half.floor_bytes / 2e11)


def test_which_plugins_move_less_than_the_builders_kernels() -> None:
    less = {site.name for site in SITES if site.work("fp16").moves_less}
    assert less == {"mmfuser, across levels", "mmfuser, within a level"}


def test_floor_of_deformable_attention_by_hand() -> None:
    work = SITES[0].work("fp16")
    value, samples, outputs = 4 * 576 * 1024, 576 * 16 * 4 * 4, 576 * 1024
    assert work.floor_bytes == 2 * (value + 3 * samples + outputs) + 576 * 2 * 4


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--dtype", "bf16"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["site"] for row in rows] == [site.name for site in SITES]
    assert main([]) == 0
    assert "mlcd-bigg-448" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--cards", "sm_70"])
    assert "sm_70: known are sm_80" in capsys.readouterr().err


def test_scratch_parameters_go_unless_they_are_used() -> None:
    short = without_scratch(PTX, "turn", 2)
    assert short.split(".entry")[1].split(")")[0].count(".param") == 2
    assert "turn_param_2" not in short
    assert without_scratch(PTX, "turn", 3).count(".param") == PTX.count(".param")
    with pytest.raises(BuildError, match="turn uses turn_param_1, turn_param_2|turn_param_1"):
        without_scratch(PTX, "turn", 1)
    with pytest.raises(BuildError, match="no kernel spin"):
        without_scratch(PTX, "spin", 2)


def test_a_card_without_ptx_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no fused kernels for sm_75"):
        SITES[0].compiled("fp16", 75)


def test_types_of_parameters_come_in_a_plugins_order() -> None:
    launch = Launch(("a", "b"), ("n",), ("y",), {"SIZE": 3}, {"b": "fp32"}, warps=4)
    kinds = {"a": "*fp16", "b": "*fp32", "n": "i32", "y": "*fp16", "SIZE": "constexpr"}
    assert list(launch.signature("fp16").items()) == list(kinds.items())


def test_floors_load_neither_triton_nor_tensorrt_nor_onnx() -> None:
    code = (
        "import sys\n"
        "from edgevlm.engines.plugins import __main__, aot\n"
        "from edgevlm.engines.plugins.rotary import plugin\n"
        "print(sorted({'triton', 'tensorrt', 'onnx', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_plugin_is_registered_where_the_parser_would_end_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorRT-RTX under TensorRT's name has no classes for plugins of this kind; nor has 10.3."""
    without = ModuleType("tensorrt")
    without.__version__ = "1.7.1.116"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", without)
    with pytest.raises(UnsupportedError, match=r"tensorrt 1\.7\.1\.116 takes no plugins"):
        aot.define(FOLDERS.values(), 89)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtra):
        aot.define(FOLDERS.values(), 89)
