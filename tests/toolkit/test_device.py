"""What a device says of itself: texts of NVIDIA's tools as they print them, and their absence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgevlm.toolkit import target
from edgevlm.toolkit.terminal import device

# Printed by a Jetson Orin NX with JetPack 6.2.1, by an AGX Orin with 7.2 and by a Nano with 4.
ORIN_NX = """SOC family:tegra234  Machine:NVIDIA Jetson Orin NX Engineering Reference Developer Kit
Online CPUs: 0-5
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=1510400 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=1497600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000
Active GPU TPCs: 2
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=65
NV Power Mode: MAXN_SUPER
"""  # noqa: E501
ORIN_NANO_7 = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super
Online CPUs: 0-5, Offline CPUs:
cpu0:  Governor=schedutil MinFreq=729600 MaxFreq=1344000 CurrentFreq=960000 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=665600000
NV Power Mode: 25W
"""  # noqa: E501
L4T = """# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: Mon Jun 16 16:07:13 UTC 2025
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
"""  # noqa: E501
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  555.58.02  Release Build  (dvs-builder@U16-I3-B03-4-3)  Tue Jun 25 01:26:03 UTC 2024
GCC version:  gcc version 14.2.1 20240801 (Red Hat 14.2.1-1) (GCC)
"""  # noqa: E501
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.127.05  Tue Oct  8 16:30:26 UTC 2024\n"
)
THOR = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  TempVersion  Release Build\n"


class Tools:
    """Answers commands by their names, as a machine with some of the tools does."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers, self.asked = answers, list[tuple[str, ...]]()

    def __call__(self, command: Sequence[str]) -> str | None:
        self.asked.append(tuple(command))
        package = command[-1] if command[0] == "dpkg-query" else command[0]
        return self.answers.get(package)


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("architecture", "driver_version", "name"):
        monkeypatch.setattr(target.card, name, lambda: None)


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    found = device.device_context(Tools({}), tmp_path)
    assert json.loads(json.dumps(found)) == found
    gone = ("jetson", "driver", "cuda", "card", "power_mode", "power_limit_w", "clocks")
    assert [found[name] for name in gone] == [None] * len(gone)
    told = dict(device.rows(found))
    assert told["JetPack"] is told["NVIDIA driver"] is told["power mode"] is None
    assert told["clocks"] is told["memory of the card"] is None


def test_this_machine_is_asked_without_failing() -> None:
    assert device.device_context()["machine"] == target.machine()


def jetson(root: Path) -> Path:
    for name, text in {
        "etc/nv_tegra_release": L4T,
        "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "624750000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, object] = {
        "architecture": "sm_87",
        "name": "Orin (nvgpu)",
        "driver_version": "12.6",
        "memory_bytes": 16 * 10**9,
        "free_bytes": None,
        "shares_memory": True,
    }
    for name, value in facts.items():
        monkeypatch.setattr(target.card, name, lambda value=value: value)
    tools = Tools(
        {
            "nvpmodel": "NV Power Mode: MAXN_SUPER\n2\n",
            "nvidia-jetpack": "6.2.1+b38",
            "libnvinfer10": "10.3.0.30-1+cuda12.5",
            "jetson_clocks": ORIN_NX,
        }
    )
    found = device.device_context(tools, jetson(tmp_path))
    assert found["jetson"]["l4t"] == "36.4.4"
    assert found["jetson"]["jetpack"] == "6.2.1+b38"
    assert found["tensorrt_library"] == "10.3.0.30-1+cuda12.5"
    assert found["power_mode"] == {"name": "MAXN_SUPER", "number": 2}
    assert found["clocks"]["gpu"] == {"now_mhz": 306, "min_mhz": 306, "max_mhz": 624.75}
    told = dict(device.rows(found))
    assert told["memory of the card"] == "16.0 GB, shared with the processor"
    assert told["clocks"] == (
        "gpu 306 of 625 MHz, memory 2133 of 2133 MHz, cpu 1510 of 1510 MHz (jetson_clocks)"
    )


def test_without_the_rights_of_root_the_kernel_is_asked(tmp_path: Path) -> None:
    found = device.device_context(Tools({}), jetson(tmp_path))
    assert found["clocks"] == {
        "source": "sysfs",
        "gpu": {"now_mhz": 306, "min_mhz": 306, "max_mhz": 624.75},
        "cpu": {"now_mhz": 729.6, "min_mhz": None, "max_mhz": None},
        "governor": "schedutil",
    }
    assert found["jetson"]["jetpack"] is None
    assert dict(device.rows(found))["JetPack"] is None


def test_clocks_of_newer_releases_and_of_the_fastest_core() -> None:
    found = device.jetson_clocks(ORIN_NANO_7)
    assert found is not None
    assert found["memory"] == {"now_mhz": 665.6, "min_mhz": 204, "max_mhz": 3199}
    faster = ORIN_NANO_7.replace("cpu0:", "cpu4:").replace("1344000", "2201600")
    both = device.jetson_clocks(ORIN_NANO_7 + faster)
    assert both is not None
    assert both["cpu"]["max_mhz"] == 2201.6
    assert (
        device.jetson_clocks("Error: Run this script(/usr/bin/jetson_clocks) as a root user")
        is None
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NV Power Mode: MAXN\n0\n", {"name": "MAXN", "number": 0}),
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_50W\n3\n", {"name": "MODE_50W", "number": 3}),
        ("NV Power Mode: MAXN_SUPER  (ID: 2)\n", {"name": "MAXN_SUPER", "number": None}),
        ("NVPM ERROR: Error opening /sys/kernel", None),
    ],
)
def test_power_modes(text: str, expected: dict[str, object] | None) -> None:
    assert device.power_mode(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [(OPEN, "555.58.02"), (CLOSED, "550.127.05"), (THOR, "TempVersion"), ("", None)],
)
def test_drivers(text: str, expected: str | None) -> None:
    assert device.driver(text) == expected


def test_cards_by_nvidia_smi(tmp_path: Path) -> None:
    two = "535.104.05, 210, 2040, 405, 6251, 72.00, P8\n535.104.05, 300, 1, 1, 1, 1.0, P0\n"
    found = device.device_context(Tools({"nvidia-smi": two}), tmp_path)
    assert (found["driver"], found["power_limit_w"]) == ("535.104.05", 72.0)
    assert found["clocks"]["gpu"] == {"now_mhz": 210, "min_mhz": None, "max_mhz": 2040}
    assert found["clocks"]["state"] == "P8"
    assert dict(device.rows(found))["power mode"] == "limit 72 W"
    lacking = "540.4.0, [N/A], [N/A], [N/A], [N/A], [N/A], [N/A]\n"
    assert device.nvidia_smi(lacking) == {"driver": "540.4.0"}
    assert device.nvidia_smi("NVIDIA-SMI has failed because it could not communicate") == {}
    assert device.l4t("# R39 (release), REVISION: 2.0, GCID: 45755727") == "39.2.0"
