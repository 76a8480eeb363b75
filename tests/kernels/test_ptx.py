"""Every kernel compiles for every card, in every number format, and fits its registers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm.engines.plugins.catalogue import SITES
from edgevlm.engines.plugins.compile import PTX_ISA

# With 128 registers, 256 threads of a block run twice at once on every card, and 128 four times.
MOST_REGISTERS = {"MSDeformAttn": 64, "LayerMerge": 128, "RotaryAttention": 64}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.usefixtures("triton", "triton_cache")
def test_registers_are_enough_and_nothing_is_spilled(dtype: str) -> None:
    cards = ",".join(f"sm_{sm}" for sm in PTX_ISA)
    command = [sys.executable, "-m", "edgevlm.engines.plugins", "--json", "--dtype", dtype]
    done = subprocess.run([*command, "--cards", cards], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout):
        assert set(row["cards"]) == {f"sm_{sm}" for sm in PTX_ISA}
        for card, used in row["cards"].items():
            where = f"{row['site']} {card} {used}"
            assert 0 < used["registers"] <= MOST_REGISTERS[row["op"]], where
            assert used["spilled_bytes"] == 0, where
            assert used["shared_bytes"] <= 48 * 1024, where


@pytest.mark.parametrize("sm", [80, 87, 90, 110])
@pytest.mark.usefixtures("triton", "triton_cache")
def test_ptx_is_what_an_engine_can_hold(sm: int, tmp_path: Path) -> None:
    """Of the right level, for the card, with a plugin's parameters, and the same everywhere."""
    for site in SITES:
        made = site.compiled("fp16", sm)
        launch = site.launch("fp16")
        whole, part = divmod(PTX_ISA[sm], 10)
        assert f".version {whole}.{part}\n" in made.ptx
        assert f".target sm_{sm}" in made.ptx
        count = made.ptx.split(".entry")[1].split(")")[0].count(".param")
        assert count == len(launch.pointers) + len(launch.scalars) + len(launch.results)
        assert str(Path(__file__).parents[2]) not in made.ptx  # no names of this machine's files
        assert "ld.global.v4.b32" in made.ptx or "ld.global.v2.b32" in made.ptx
