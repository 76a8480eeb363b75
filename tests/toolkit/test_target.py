"""Targets as text, and which engine may run where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.toolkit import target
from edgevlm.toolkit.errors import ConfigError, TargetMismatch
from edgevlm.toolkit.target import (
    BACKENDS,
    DEVICES,
    Target,
    check_runs_here,
    parse,
    release,
    saturates_int8,
)

VERSIONS = st.lists(st.integers(0, 30), max_size=4).map(tuple)
TARGETS = st.builds(
    Target, st.sampled_from(BACKENDS), VERSIONS, st.from_regex(r"[a-z0-9_]{1,9}", fullmatch=True)
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(TARGETS)
def test_a_target_is_its_text(value: Target) -> None:
    assert parse(str(value)) == value


def test_the_text_form() -> None:
    assert str(Target("tensorrt", (10, 16), "sm_87")) == "tensorrt@10.16/sm_87"
    assert str(Target("onnxruntime", (), "x86_64")) == "onnxruntime/x86_64"


@pytest.mark.parametrize("name", DEVICES)
def test_devices_go_by_name(name: str) -> None:
    device = DEVICES[name]
    assert parse(name) == parse(str(device.target)) == device.target
    assert min(device.memory_gb, device.bandwidth_gb_s, *device.peak_tops.values()) > 0


def test_this_machine_goes_by_name() -> None:
    import onnxruntime

    here = parse("cpu")
    assert here == parse("onnxruntime") == target.this_cpu()
    assert here.version == release(onnxruntime.__version__)
    assert parse("reference") == Target("reference", (), here.arch)


@pytest.mark.parametrize(
    "text",
    [
        "", "gpu", "tensorrt", "tensorrt@10.16", "tensorrt@10.16/", "/sm_87", "torch@2/sm_87",
        "tensorrt@x/sm_87", "tensorrt@10.x/sm_87", "tensorrt@-1/sm_87", "tensorrt@1_0/sm_87",
        "tensorrt@10..16/sm_87", "tensorrt@/sm_87", "tensorrt@ 10/sm_87", "TENSORRT@10/sm_87",
    ],
)  # fmt: skip
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert repr(text) in refused.value.message or "not a version" in refused.value.message


def test_a_refusal_names_what_is_near() -> None:
    with pytest.raises(ConfigError) as refused:
        parse("jetson-orin")
    assert "jetson-orin-nano" in refused.value.hint


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1.31.1", (1, 31, 1)), ("10.3.0.26+cu13", (10, 3, 0, 26)), ("2.1rc1", (2,)), ("", ())],
)
def test_releases(text: str, numbers: tuple[int, ...]) -> None:
    assert release(text) == numbers


def test_what_is_not_installed_has_no_version() -> None:
    assert target.installed("no-such-package-here") == ()


RUNS = [
    ("onnxruntime@1.30.1/x86_64", "onnxruntime@1.31.0/x86_64"),
    ("onnxruntime@1.31.9/x86_64", "onnxruntime@1.31.0/x86_64"),
    ("onnxruntime/x86_64", "onnxruntime@1.31.0/x86_64"),
    ("tensorrt@10.16/sm_87", "tensorrt@10.16/sm_87"),
    ("reference/x86_64", "reference/x86_64"),
    ("onnxruntime-cuda@1.31.1/sm_89", "onnxruntime-cuda@1.31.9/sm_89"),
    ("onnxruntime-cuda@1.30/sm_80", "onnxruntime-cuda@1.31/sm_90"),
]
DOES_NOT = [
    ("onnxruntime@1.32.0/x86_64", "onnxruntime@1.31.0/x86_64", "release 1.32.0, here the older"),
    ("onnxruntime@2.0/x86_64", "onnxruntime@1.31.0/x86_64", "release 2.0"),
    ("onnxruntime@1.31/aarch64", "onnxruntime@1.31/x86_64", "architecture aarch64, here x86_64"),
    ("tensorrt@10.16/sm_87", "tensorrt@10.17/sm_87", "release 10.16, here 10.17"),
    ("tensorrt@10.16/sm_87", "tensorrt/sm_87", "release 10.16, here none"),
    ("tensorrt@10.16/sm_87", "tensorrt@10.16/sm_90", "architecture sm_87"),
    ("tensorrt@10.16/sm_87", "onnxruntime@1.31/x86_64", "backend tensorrt.*architecture sm_87"),
    ("onnxruntime-cuda@1.32/sm_89", "onnxruntime-cuda@1.31/sm_89", "release 1.32, here the older"),
    ("onnxruntime-cuda@1.31/sm_90", "onnxruntime-cuda@1.31/sm_89", "sm_90, here the older sm_89"),
    ("onnxruntime-cuda@1.31/sm_89", "onnxruntime-cuda@1.31/sm_100", "no kernels for sm_100"),
    ("onnxruntime-cuda@1.31/sm_89", "onnxruntime-cuda@1.31/no-device", "there is no NVIDIA card"),
    ("onnxruntime-cuda@1.31/sm_89", "onnxruntime-cuda/sm_89", "onnxruntime-gpu is not installed"),
    ("onnxruntime-cuda@1.31/sm_89", "onnxruntime@1.31/x86_64", "backend onnxruntime-cuda"),
]


@pytest.fixture
def beside_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which cards have kernels depends on the processor beside them."""
    monkeypatch.setattr(target, "machine", lambda: "x86_64")


def test_cuda_is_the_card_that_the_driver_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target.card, "architecture", lambda: "sm_89")
    monkeypatch.setattr(target, "installed", lambda package: (1, 31, 1))
    assert str(parse("cuda")) == "onnxruntime-cuda@1.31.1/sm_89"
    monkeypatch.setattr(target.card, "architecture", lambda: None)
    with pytest.raises(TargetMismatch, match="there is none that its driver knows") as refused:
        parse("cuda")
    assert "onnxruntime-cuda@1.31.1/sm_89" in refused.value.hint


def test_a_machine_without_a_card_says_so() -> None:
    card = target.card
    if card.architecture() is None:
        assert card.name() is None
    assert (card.free_bytes() or 1) > 0


def test_beside_an_arm_processor_other_cards_have_kernels(
    monkeypatch: pytest.MonkeyPatch, beside_x86: None
) -> None:
    built, here = (parse(f"onnxruntime-cuda@1.31/{arch}") for arch in ("sm_90", "sm_121"))
    with pytest.raises(TargetMismatch, match="no kernels for sm_121 on x86_64"):
        check_runs_here(built, here, "edgevlm build")
    monkeypatch.setattr(target, "machine", lambda: "aarch64")
    check_runs_here(built, here, "edgevlm build")


@pytest.mark.parametrize(("built", "here"), RUNS)
def test_what_runs_here(built: str, here: str, beside_x86: None) -> None:
    check_runs_here(parse(built), parse(here), "edgevlm build")


@pytest.mark.parametrize(("built", "here", "reason"), DOES_NOT)
def test_what_does_not_run_here(built: str, here: str, reason: str, beside_x86: None) -> None:
    with pytest.raises(TargetMismatch, match=reason) as refused:
        check_runs_here(parse(built), parse(here), "edgevlm build B E")
    assert built in refused.value.message
    assert refused.value.hint == "build it here: edgevlm build B E"


def test_names_of_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, meant in (("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")):
        monkeypatch.setattr("platform.machine", lambda name=name: name)
        assert target.machine() == meant


FLAGS = {
    "zen 3": ("fpu sse4_2 avx avx2 fma sha_ni vaes vpclmulqdq", True),
    "zen 5": ("fpu sse4_2 avx avx2 fma avx512f avx512bw avx512_vnni avx_vnni", False),
    "skylake-x": ("fpu avx avx2 fma avx512f avx512bw avx512vl", True),
    "alder lake": ("fpu avx avx2 fma avx_vnni", False),
    "a name that only contains it": ("fpu avx2 no_avx_vnni_here", True),
}


@pytest.mark.parametrize("name", FLAGS)
def test_vnni_is_read_from_the_flags(name: str, tmp_path: Path) -> None:
    flags, saturates = FLAGS[name]
    one = f"processor\t: 0\nmodel name\t: avx512_vnni\nflags\t\t: {flags}\nvmx flags\t: vnmi\n\n"
    (tmp_path / "cpuinfo").write_text(2 * one)
    assert saturates_int8("x86_64", tmp_path / "cpuinfo") is saturates
    assert saturates_int8("aarch64", tmp_path / "cpuinfo") is False


def test_where_flags_cannot_be_read_products_may_saturate(tmp_path: Path) -> None:
    assert saturates_int8("x86_64", tmp_path / "absent") is True
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert saturates_int8("x86_64", tmp_path / "cpuinfo") is True


def test_all_processors_must_have_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t: avx2 avx_vnni\n\nflags\t: avx2\n")
    assert saturates_int8("x86_64", tmp_path / "cpuinfo") is True


def test_arm_states_numbers_for_a_name(tmp_path: Path) -> None:
    """As on a Jetson Orin; two kinds of cores never share what was timed."""
    file = tmp_path / "cpuinfo"

    def of(part: str) -> str:
        file.write_text(
            "processor\t: 0\nFeatures\t: asimd asimddp\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 1\n"
        )
        return target.processor_kind(file)

    assert of("0xd42").startswith("Cortex-A78AE 0x41/0xd42/1 ")
    assert target.processor_name(file) == "Cortex-A78AE"
    assert of("0xfff") != of("0xffe")  # without names


# -- processors ---------------------------------------------------------------------------------

GROUPS: dict[str, tuple[dict[str, str], str, float | None]] = {
    "nothing": ({}, "0::/\n", None),
    "v2, none": ({"cpu.max": "max 100000\n"}, "0::/\n", None),
    "v2": ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
    "v2, half": ({"cpu.max": "50000 100000\n"}, "0::/\n", 0.5),
    "v2, own group": ({"a/b/cpu.max": "300000 100000"}, "0::/a/b\n", 3.0),
    "v2, the group above is tighter": (
        {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000", "cpu.max": "max 100000"},
        "0::/a/b\n",
        2.0,
    ),
    "v2, another group": ({"c/cpu.max": "100000 100000"}, "0::/a\n", None),
    "v1": (
        {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        "4:memory:/x\n3:cpu,cpuacct:/\n",
        2.5,
    ),
    "v1, none": (
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        "3:cpu:/\n",
        None,
    ),
    "v1, own group": (
        {
            "cpu,cpuacct/d/cpu.cfs_quota_us": "400000",
            "cpu,cpuacct/d/cpu.cfs_period_us": "100000",
        },
        "3:cpu,cpuacct:/d\n",
        4.0,
    ),
    "v1, a group of memory": ({"memory/d/cpu.max": "100000 100000"}, "5:memory:/d\n", None),
    "damaged": ({"cpu.max": "many\n"}, "0::/\n", None),
    "empty": ({"cpu.max": ""}, "", None),
    "zero": ({"cpu.max": "0 0"}, "0::/\n", None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_the_quota_of_a_container(case: str, tmp_path: Path) -> None:
    files, own, expected = GROUPS[case]
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert target.processor_quota(tmp_path / "root", tmp_path / "own") == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert target.processor_quota(tmp_path / "none", tmp_path / "neither") is None


@pytest.mark.parametrize(
    ("quota", "threads"), [(None, 6), (0.2, 1), (1.0, 1), (1.5, 2), (2.0, 2), (5.01, 6), (64.0, 6)]
)
def test_threads_are_within_the_quota_rounded_up(
    quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(target, "processor_quota", lambda: quota)
    assert target.threads_here() == threads


def test_instruction_sets_of_x86_and_arm(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name : A\nflags : fpu avx2 avx512f avx512_vnni sse\n")
    assert target.instruction_sets(file) == ("avx2", "avx512f", "avx512_vnni")
    file.write_text("processor : 0\nFeatures : fp asimd asimddp i8mm\n\nprocessor : 1\n")
    assert target.instruction_sets(file) == ("asimd", "asimddp", "i8mm")
    assert target.instruction_sets(tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gpu", "cuda"),
        ("Orin", "jetson-orin-nano, jetson-agx-orin"),
        ("cpuu", "cpu"),
        ("h10", "h100"),
    ],
)
def test_a_target_that_is_not_known_gets_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(typed)
    assert refused.value.hint.startswith(f"known: {meant}")
