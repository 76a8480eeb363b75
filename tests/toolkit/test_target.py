"""Targets as text, and which engine may run where."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.toolkit import target
from edgevlm.toolkit.errors import ConfigError, TargetMismatch
from edgevlm.toolkit.target import BACKENDS, DEVICES, Target, check_runs_here, parse, release

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
]
DOES_NOT = [
    ("onnxruntime@1.32.0/x86_64", "onnxruntime@1.31.0/x86_64", "release 1.32.0, here the older"),
    ("onnxruntime@2.0/x86_64", "onnxruntime@1.31.0/x86_64", "release 2.0"),
    ("onnxruntime@1.31/aarch64", "onnxruntime@1.31/x86_64", "architecture aarch64, here x86_64"),
    ("tensorrt@10.16/sm_87", "tensorrt@10.17/sm_87", "release 10.16, here 10.17"),
    ("tensorrt@10.16/sm_87", "tensorrt/sm_87", "release 10.16, here none"),
    ("tensorrt@10.16/sm_87", "tensorrt@10.16/sm_90", "architecture sm_87"),
    ("tensorrt@10.16/sm_87", "onnxruntime@1.31/x86_64", "backend tensorrt.*architecture sm_87"),
]


@pytest.mark.parametrize(("built", "here"), RUNS)
def test_what_runs_here(built: str, here: str) -> None:
    check_runs_here(parse(built), parse(here), "edgevlm build")


@pytest.mark.parametrize(("built", "here", "reason"), DOES_NOT)
def test_what_does_not_run_here(built: str, here: str, reason: str) -> None:
    with pytest.raises(TargetMismatch, match=reason) as refused:
        check_runs_here(parse(built), parse(here), "edgevlm build B E")
    assert built in refused.value.message
    assert refused.value.hint == "build it here: edgevlm build B E"


def test_names_of_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, meant in (("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")):
        monkeypatch.setattr("platform.machine", lambda name=name: name)
        assert target.machine() == meant
