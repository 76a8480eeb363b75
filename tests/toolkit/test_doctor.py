"""The doctor: what is here, what is missing, and the command that gets it."""

from __future__ import annotations

import platform
import re

import pytest

from edgevlm.toolkit import target
from edgevlm.toolkit.target import this_cpu, threads_here
from edgevlm.toolkit.terminal import doctor

ALL = dict.fromkeys(doctor._PACKAGES, "1.0") | {"onnxruntime-gpu": None}


def report(
    monkeypatch: pytest.MonkeyPatch, **changes: str | None
) -> tuple[dict[str, object], str, list[dict[str, str]]]:
    """Data, text and problems with these packages in place of the machine's."""
    found = ALL | {name.replace("_", "-"): version for name, version in changes.items()}
    monkeypatch.setattr(doctor, "_version", found.__getitem__)
    data, lines = doctor.report("9.9")
    problems = data["problems"]
    assert isinstance(problems, list)
    return data, "\n".join(lines), problems


def test_a_whole_installation_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    data, text, problems = report(monkeypatch)
    assert problems == []
    assert data["targets"] == [str(this_cpu()), "reference"]
    assert data["python"] == platform.python_version()
    assert data["processor_threads"] == threads_here()
    assert f"edgevlm 9.9, Python {platform.python_version()}" in text
    assert f"targets here: {this_cpu()}, reference" in text
    assert f"an engine uses {threads_here()} threads" in text
    assert "problem:" not in text


@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({"onnxruntime": None}, "engines cannot run", "edgevlm[cpu]"),
        ({"onnx": None}, "no export, no build", "edgevlm[export]"),
        ({"onnxruntime_gpu": "1.0"}, "overwrite each other", "edgevlm[gpu]"),
    ],
)
def test_a_problem_comes_with_its_cure(
    changes: dict[str, str | None], problem: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, text, problems = report(monkeypatch, **changes)
    assert len(problems) == 1
    assert problem in problems[0]["problem"]
    assert problems[0]["fix"].startswith("pip ")
    assert fix in problems[0]["fix"]
    assert f"problem: {problems[0]['problem']}\nfix:     {problems[0]['fix']}" in text
    assert (", ".join(map(str, data["targets"])) == "reference") == (  # type: ignore[call-overload]
        changes.get("onnxruntime", "1.0") is None
    )


def test_every_package_has_a_line_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _, text, _ = report(monkeypatch, torch=None)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["torch"] == ["torch", "-", "edgevlm[train]"]
    assert rows["numpy"] == ["numpy", "1.0", "base"]
    assert doctor._PACKAGES.keys() <= rows.keys()


def test_the_versions_are_those_of_this_machine() -> None:
    import numpy

    data, _ = doctor.report("9.9")
    assert data["packages"]["numpy"] == numpy.__version__
    assert doctor._version("no-such-package-of-this-name") is None


def test_8_bit_products_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    here = "never measured on this architecture"
    for arch, saturates, sets, expected in (
        ("x86_64", False, (), "signed weights (VNNI)"),
        ("x86_64", True, (), "unsigned weights"),
        ("aarch64", False, ("asimd",), f"unsigned weights; {here}"),
        ("aarch64", False, ("asimddp",), f"unsigned weights (UDOT); {here}"),
        ("aarch64", False, ("asimddp", "i8mm"), f"unsigned weights (UMMLA); {here}"),
    ):
        monkeypatch.setattr(doctor, "instruction_sets", lambda sets=sets: sets)
        monkeypatch.setattr(doctor, "machine", lambda arch=arch: arch)
        monkeypatch.setattr(doctor, "saturates_int8", lambda saturates=saturates: saturates)
        _, lines = doctor.report("9.9")
        assert f"8-bit products: {expected}" in lines


def test_a_card_is_named_with_what_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "architecture": "sm_89",
        "name": "L4",
        "driver_version": "13.0",
        "free_bytes": 2 * 10**9,
    }
    for name, value in facts.items():
        monkeypatch.setattr(target.card, name, lambda value=value: value)
    monkeypatch.setattr(doctor, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "this_card", lambda: "onnxruntime-cuda@1.31.1/sm_89")
    data, text, problems = report(monkeypatch, onnxruntime=None, onnxruntime_gpu="1.31.1")
    assert data["targets"] == ["onnxruntime-cuda@1.31.1/sm_89", str(this_cpu()), "reference"]
    assert "L4 (sm_89, 2.0 GB free), its driver runs CUDA 13.0" in text
    assert "onnxruntime-gpu: " in text
    assert "CPUExecutionProvider" in str(data["onnxruntime_providers"])
    assert problems == []


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [(None, "there is no NVIDIA card"), ("sm_87", "has kernels for sm_75, .* this card is sm_87")],
)
def test_a_card_without_kernels_is_a_problem(
    architecture: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.card, "architecture", lambda: architecture)
    monkeypatch.setattr(doctor, "machine", lambda: "x86_64")
    data, _, problems = report(monkeypatch, onnxruntime=None, onnxruntime_gpu="1.31.1")
    assert len(problems) == 1
    assert re.search(reason, problems[0]["problem"])
    assert "TensorRT" in problems[0]["fix"]
    assert "cuda" not in str(data["targets"])
