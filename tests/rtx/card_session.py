"""A session of TensorRT's stand-in on the real cuda-core, over the driver of driver.c.

    python -m tests.rtx.card_session RELEASE FOLDER     with libcuda.so.1 on the library path

prints as JSON the tokens of the golden question, twice, and what the driver counted.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgevlm import api
from edgevlm.engines.backends.tensorrt import device
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.ops.vocabulary import Array
from tests.engines.backends.tensorrt.conftest import GOLDEN
from tests.engines.backends.tensorrt.cuda_standin import World
from tests.engines.backends.tensorrt.machine import installed
from tests.engines.backends.tensorrt.test_sessions import QUESTION

WORK = ctypes.CFUNCTYPE(None)


class Streams:
    """The driver's streams, as trt_standin.py asks for them."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self._driver = driver

    def __contains__(self, handle: int) -> bool:
        return handle > 0

    def __getitem__(self, handle: int) -> Any:
        capturing = self._driver.capturing(ctypes.c_void_p(handle))
        return SimpleNamespace(recording=[] if capturing else None)


class DriverWorld(World):
    """The card of driver.c: an address is one of this process."""

    def __init__(self) -> None:
        super().__init__()
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._works: list[Any] = []  # which the driver calls, also when a graph is launched
        self.failed: list[BaseException] = []
        self.streams = Streams(self._driver)  # type: ignore[assignment]

    def check_thread(self) -> None:
        """The driver does."""

    def memory(self, address: int, nbytes: int, *, card: bool = False) -> Array:
        memory = (ctypes.c_char * nbytes).from_address(address)
        return np.frombuffer(memoryview(memory).cast("B"), np.uint8)

    def enqueue(self, handle: int, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as odd:  # nothing may pass through the driver
                self.failed.append(odd)

        self._works.append(WORK(guarded))
        assert self._driver.enqueue(ctypes.c_void_p(handle), self._works[-1]) == 0

    def counts(self) -> list[int]:
        found = (ctypes.c_long * 5)()
        self._driver.counts(found)
        return list(found)


def main(release: str, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        facts, architecture = device.facts(), device.architecture()
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        world = DriverWorld()
        machine = installed(release, patch, folder / "packages", world)
        patch.setattr(device, "facts", lambda number=0: None)
        bundle, engine = folder / "bundle", folder / "engine"
        api.export_bundle(GOLDEN / "llava-v1.5-tiny", bundle, dtype="fp32")
        made = api.build_engine(bundle, engine, target=str(machine.target))
        with Session.open(engine) as session:
            answers = [session.answer(QUESTION).token_ids for _ in range(2)]
            during = world.counts()
        assert not world.failed, world.failed
    assert facts is not None
    found = {
        "card": [facts.name, facts.cuda, facts.shared, architecture],
        "verified": made.verified,
        "answers": answers,
        "during": during,
        "after": world.counts(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
