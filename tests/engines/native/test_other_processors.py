"""The kernels' forms for other processors than this one, compiled for them and run by emulators."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgevlm.engines.native import library
from edgevlm.toolkit.target import instruction_sets, machine
from tests.conftest import HERE
from tests.engines.native.test_kernels import exact, tensors

SOURCES = HERE.parent / "engines/native"
HARNESS = Path(__file__).with_name("harness.c")
ARM = "aarch64-linux-gnu-gcc"


def program(name: str) -> str:
    """Where a program is; without it the test is skipped."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}")
    return found


def compiled(compiler: str, out: Path, *flags: str) -> Path:
    """All kernels, with what tests them unless it is for a library."""
    files = [*SOURCES.glob("*.c"), *([] if "-shared" in flags else [HARNESS])]
    command = [program(compiler), "-std=c11", "-O1", *flags, "-I", str(SOURCES), "-o", str(out)]
    subprocess.run([*command, *map(str, files), "-lm"], check=True, timeout=120)
    return out


def compared(command: list[str]) -> list[str]:
    """The forms that the harness compared with the plain one."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line.removeprefix("compared ") for line in done.stdout.splitlines()]


def test_forms_for_arm_compute_what_the_plain_one_does(tmp_path: Path) -> None:
    emulator = program("qemu-aarch64")
    harness = str(compiled(ARM, tmp_path / "harness", "-static"))
    assert compared([emulator, "-cpu", "max", harness]) == ["plain", "dotprod"]
    # Raspberry Pi 4: no dot products
    assert compared([emulator, "-cpu", "cortex-a72", harness]) == ["plain"]


@pytest.mark.skipif(machine() != "x86_64", reason="the emulated program is for x86")
@pytest.mark.parametrize(
    ("processor", "forms"),
    [("Haswell", ["plain", "avx2"]), ("SandyBridge", ["plain"])],
)
def test_older_processors_use_what_they_have(
    harness: str, processor: str, forms: list[str]
) -> None:
    """An emulator that lacks an instruction ends the program that uses it."""
    assert compared([program("qemu-x86_64"), "-cpu", processor, harness]) == forms


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> str:
    program("qemu-x86_64")
    return str(compiled("cc", tmp_path_factory.mktemp("harness") / "harness"))


@pytest.mark.skipif(
    "avx512_vnni" not in instruction_sets(), reason="this processor lacks VNNI of AVX-512"
)
def test_the_form_of_avx_vnni_in_the_encoding_of_avx512(tmp_path: Path) -> None:
    """The instruction does the same; few processors have it in the other encoding alone."""
    path = compiled("cc", tmp_path / "evex.so", "-shared", "-fPIC", '-DEDGEVLM_VEX=""')
    kernels = ctypes.CDLL(str(path))
    pointer, number = np.ctypeslib.ndpointer(np.float32), library.FORMS.index("avx-vnni")
    kernels.edgevlm_attend.argtypes = [
        *[pointer] * 4,
        np.ctypeslib.ndpointer(np.uintp),
        ctypes.c_int,
    ]
    for kind in ("random", "offsets", "sinks"):
        q, k, v = tensors((1, 33, 577, 2, 72), kind)
        found, wanted = np.empty_like(q), exact(q, k, v, 2)
        sizes = np.asarray((1, 33, 577, 2, 72), np.uintp)
        assert kernels.edgevlm_attend(q, k, v, found, sizes, number) == 0
        error = np.sqrt(np.square(found - wanted).sum() / np.square(wanted).sum())
        assert error < 0.01


def test_the_library_is_made_for_arm_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it needs the processor; what is chosen and compiled does not."""
    program(ARM)
    monkeypatch.setattr(library, "machine", lambda: "aarch64")
    monkeypatch.setattr(library, "instruction_sets", lambda: ("asimd", "asimddp"))
    monkeypatch.setattr(library, "_loaded", lambda path, forced: library.Native(path))
    made = library._native(tmp_path / "native", ARM).path
    assert made is not None
    assert made.read_bytes()[18:20] == b"\xb7\x00"  # ELF's number of the architecture
    here = library._name(Path(program(ARM)))
    monkeypatch.setattr(library, "machine", lambda: "x86_64")
    assert library._name(Path(program(ARM))) != here  # homes may be shared
    monkeypatch.setattr(library, "machine", lambda: "aarch64")
    monkeypatch.setattr(library, "instruction_sets", lambda: ("asimd",))
    library._native.cache_clear()
    assert library._native(tmp_path / "native", ARM).why == "this processor has no asimddp"
