"""Metrics by AIPerf's definitions, memory over time, the context, and the drift of engines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import Session
from edgevlm.engines.profiling import metrics
from edgevlm.engines.profiling.asked import ProfileRequest
from edgevlm.engines.profiling.context import device_part, processor_context, warnings
from edgevlm.engines.profiling.drift import Followed
from edgevlm.toolkit.terminal.device import device_context
from tests.conftest import ROOT
from tests.sealing import reseal


def test_metrics_have_aiperfs_definitions() -> None:
    runs = [
        metrics.Request(100.0, [10.0, 20.0, 30.0], 50),
        metrics.Request(200.0, [40.0, 40.0, 40.0], 50),
    ]
    found = metrics.of_requests(runs, {"prefill": [80.0, 90.0]})
    assert found["time_to_first_token"].mean == 150.0
    assert found["time_to_second_token"].max == 40.0
    assert found["inter_token_latency"].p50 == 30.0  # of the means 20 and 40
    assert found["request_latency"].min == 160.0
    assert found["output_token_throughput"].max == 1000 * 4 / 160
    assert found["output_token_throughput_per_user"].min == 25.0
    assert found["prefill_throughput_per_user"].max == 500.0
    assert found["output_sequence_length"].mean == 4
    assert found["input_sequence_length"].std == 0
    assert (found["prefill"].unit, found["prefill"].count) == ("ms", 2)


def test_a_distribution_is_numpys() -> None:
    values = np.random.default_rng(0).gamma(2.0, 5.0, 300).tolist()
    found = metrics.distribution(values, "ms")
    for name, share in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert getattr(found, name) == pytest.approx(np.percentile(values, share), abs=1e-3)
    assert (found.min, found.max) == pytest.approx((min(values), max(values)), abs=1e-3)
    assert found.std == pytest.approx(np.std(values), abs=1e-3)


# In a process of its own, which gives nothing back meanwhile that something else has left in it.
HOLDING = """
import json, time
import numpy as np
from edgevlm.engines.profiling.residence import MemoryRecorder
def another(held):
    count = len(held.samples)
    while len(held.samples) == count and held._thread.is_alive():
        time.sleep(0.001)
with MemoryRecorder() as held:
    another(held)
    another(held)
    held.mark("more")
    block = np.ones(64 << 20, np.uint8)
    another(held)
    another(held)
print(json.dumps([held.samples, held.marks]))
"""


def test_memory_is_seen_while_it_is_held() -> None:
    command = [sys.executable, "-c", HOLDING]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    samples, ((began, _),) = json.loads(done.stdout)
    if not samples:
        pytest.skip("this system does not tell what a process holds")
    before = [mb for moment, mb in samples if moment < began]
    after = [mb for moment, mb in samples if moment > began]
    assert max(after) - min(before) > 48
    assert [t for t, _ in samples] == sorted(t for t, _ in samples)


def test_the_context_is_read_from_where_linux_tells_it(tmp_path: Path) -> None:
    core = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    core.mkdir(parents=True)
    (core / "scaling_governor").write_text("schedutil\n")
    (core / "scaling_max_freq").write_text("3500000\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor: 0\ncpu MHz\t\t: 2445.434\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16384000 kB\n")
    found = processor_context(tmp_path)
    assert (found["governor"], found["clock_max_mhz"]) == ("schedutil", 3500.0)
    assert (found["clock_mhz"], found["memory_gb"]) == (2445.4, 16.8)
    (core / "scaling_cur_freq").write_text("1200000")
    assert processor_context(tmp_path)["clock_mhz"] == 1200.0
    nowhere = processor_context(tmp_path / "nowhere")
    assert nowhere["governor"] is nowhere["clock_mhz"] is nowhere["memory_gb"] is None
    assert nowhere["versions"]["numpy"] == np.__version__


def test_a_card_and_a_jetson_say_what_they_are(tmp_path: Path) -> None:
    smi = "580.95.05, 2520, 2520, 10501, 10501, 450.00, P0\n"
    answers = {"nvidia-smi": smi, "nvpmodel": "NV Power Mode: 25W\n1\n"}
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("NVIDIA Jetson Orin Nano\0")
    found = device_context(lambda command: answers.get(command[0]), tmp_path)
    told = device_part(found)["device"]
    assert told["jetson"]["model"] == "NVIDIA Jetson Orin Nano"
    assert (told["driver"], told["power_mode"]) == ("580.95.05", {"name": "25W", "number": 1})
    assert told["clocks"]["gpu"]["now_mhz"] == 2520.0
    plain = device_context(lambda command: None, tmp_path / "nowhere")
    assert device_part({**plain, "card": None}) == {}


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ({"load_average": 2.5, "processors": 2}, ["2.5 runnable programs on 2 processors"]),
        ({"load_average": 2.0, "processors": 2}, []),
        ({"load_average": None, "processors": 2}, []),
        ({}, []),
    ],
)
def test_a_loaded_machine_is_told(context: Mapping[str, Any], told: list[str]) -> None:
    found = warnings(context)
    assert len(found) == len(told)
    assert all(words in line for words, line in zip(told, found, strict=True))


def test_drift_is_zero_for_the_same_engine_and_not_for_other_weights(
    ready: Path, tmp_path: Path
) -> None:
    engine = ready / "engine-cpu"
    other = shutil.copytree(engine, tmp_path / "other")
    file = other / "lm.safetensors"
    data = bytearray(file.read_bytes())
    weights = np.frombuffer(data, np.float32, offset=len(data) % 4 + len(data) // 8 * 4)
    weights *= np.float32(1.5)  # the second half of the file
    file.write_bytes(data)
    reseal(other / "engine.json")
    request, followed = ProfileRequest(max_tokens=5, prompt_tokens=6), Followed()
    found = []
    for folder in (engine, engine, other):
        with Session.open(folder, threads=1) as session:
            found.append(followed.drift(session, request))
    first, same, changed = found
    assert first is not None and same is not None and changed is not None
    assert (same.kl, same.top1, same.positions) == (0.0, 1.0, 5)
    assert first == same
    assert changed.kl > 1e-3
