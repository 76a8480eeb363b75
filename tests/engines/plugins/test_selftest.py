"""The self-test of kernels on a stand-in for cuda-core: what it launches, and what it reports."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.plugins import selftest
from edgevlm.engines.plugins.catalogue import SMALL, Site
from edgevlm.engines.plugins.compile import Compiled
from edgevlm.engines.plugins.trial import stored, trial
from edgevlm.toolkit.ops.vocabulary import Array


class Memory:
    """A buffer of the host, whose address is real."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = (ctypes.c_char * size)()
        self.handle = ctypes.addressof(self.bytes)

    def copy_from(self, other: Memory, *, stream: object) -> None:
        ctypes.memmove(self.handle, other.handle, self.size)

    def copy_to(self, other: Memory, *, stream: object) -> None:
        ctypes.memmove(other.handle, self.handle, self.size)


class Event:
    """A moment; two are always half a millisecond apart."""

    def __sub__(self, other: Event) -> float:
        return 0.5


class Stream:
    """Does everything at once."""

    def record(self, *, options: object) -> Event:
        return Event()

    def sync(self) -> None:
        return None


class Device:
    """A card of compute capability 8.7."""

    compute_capability = (8, 7)
    name = "a stand-in"

    def __init__(self, number: int) -> None:
        assert number == 0

    def set_current(self) -> None:
        return None

    def create_stream(self) -> Stream:
        return Stream()

    def allocate(self, size: int, *, stream: object) -> Memory:
        return Memory(size)


class Core(ModuleType):
    """cuda.core, as far as it is used. A launch writes what it was told the results are."""

    Device, EventOptions = Device, dict

    def __init__(self) -> None:
        super().__init__("cuda.core")
        self.answers: list[Sequence[Array]] = []
        self.launches: list[tuple[dict[str, int], tuple[Any, ...]]] = []
        self.ObjectCode = self.LegacyPinnedMemoryResource = self.LaunchConfig = self

    def __call__(self, **given: Any) -> Any:
        return given or self

    def allocate(self, size: int) -> Memory:
        return Memory(size)

    def from_ptx(self, ptx: bytes) -> Core:
        assert isinstance(ptx, bytes)
        return self

    def get_kernel(self, name: str) -> str:
        return name

    def launch(self, stream: Stream, config: dict[str, int], kernel: str, *arguments: Any) -> None:
        self.launches.append((config, arguments))
        answer = self.answers[0] if self.answers else ()
        for address, array in zip(reversed(arguments), reversed(answer), strict=False):
            ctypes.memmove(address, array.ctypes.data, array.nbytes)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    """Put the stand-in in the place of cuda-core, and PTX in that of Triton."""
    made = Core()
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.core", made)
    compiled = Compiled("kernel", ".version 8.5", 128, 64)
    monkeypatch.setattr(Site, "compiled", lambda *_: compiled)
    return made


@pytest.mark.parametrize("dtype", selftest.MOST)
@pytest.mark.parametrize("site", SMALL, ids=lambda site: site.name)
def test_a_kernel_gets_what_a_plugins_would(site: Site, dtype: str, core: Core) -> None:
    asked = trial(site, dtype, np.random.default_rng(5))
    core.answers = [[stored(array, dtype) for array in asked.expected]]
    row = selftest.check(selftest.Card(), site, dtype, 5)
    assert row["right"]
    assert row["difference"] < selftest.MOST[dtype]
    assert row["ms"] == 0.5
    assert row["gb_s"] == pytest.approx(site.work(dtype).floor_bytes / 5e5)
    config, arguments = core.launches[0]
    assert config == {"grid": site.programs(dtype), "block": 128, "shmem_size": 64}
    launch = site.launch(dtype)
    at = len(launch.pointers)
    assert len(arguments) == at + 1 + len(launch.results)
    assert isinstance(arguments[at], np.int32)  # a Python int would be passed in 8 bytes
    assert int(arguments[at]) == site.sizes[-1]


def test_a_wrong_kernel_is_reported(core: Core, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--small"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["card"], report["sm"]) == ("a stand-in", 87)
    assert len(report["rows"]) == 3 * len(SMALL)
    assert not any(row["right"] for row in report["rows"])


def test_a_card_without_ptx_of_ours(
    core: Core, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Device, "compute_capability", (7, 5))
    assert selftest.main([]) == 1
    assert "a stand-in is sm_75, for which no kernels are compiled" in capsys.readouterr().err


def test_without_a_card_or_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert selftest.main([]) == 1
    assert "pip install 'edgevlm[kernels]'" in capsys.readouterr().err
