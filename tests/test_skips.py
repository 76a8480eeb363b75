"""What may be skipped: an ONNX Runtime that is too old, goldens that are not the project's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.toolkit.errors import AccuracyError, UnsupportedError
from edgevlm.toolkit.target import Target
from tests import conftest
from tests.conftest import COMMITTED, HERE, beyond_this_runtime, golden_case


def raised(kind: str, text: str) -> Exception:
    """An error as ONNX Runtime raises it."""
    made: type[Exception] = type(kind, (Exception,), {"__module__": "onnxruntime.capi"})
    return made(text)


LACKS = [
    UnsupportedError("no row for TensorScatter"),
    raised("NotImplemented", "Could not find an implementation for TensorScatter(24)"),
    raised("InvalidGraph", "TensorScatter is not a registered function/op"),
    raised("Fail", "Opset 24 is under development and support for this is limited"),
]
FAILS = [
    AssertionError("wrong"),
    AccuracyError("lm differs"),
    raised("Fail", "Missing Input: x"),
    raised("RuntimeException", "Non-zero status code returned while running Add"),
    raised("InvalidArgument", "Got invalid dimensions for input"),
]


@pytest.mark.parametrize("version", [(1, 23, 2), (1, 24, 0)])
def test_only_what_an_old_runtime_lacks_is_skipped(
    version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "this_cpu", lambda: Target("onnxruntime", version, "x86_64"))
    old = version < (1, 24)
    assert [beyond_this_runtime(error) for error in LACKS] == [old] * len(LACKS)
    assert not any(beyond_this_runtime(error) for error in FAILS)


def test_goldens_of_the_project_are_all_known() -> None:
    assert {path.name for path in (HERE / "goldens").iterdir() if path.is_dir()} == COMMITTED


def test_a_missing_golden_of_the_project_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "golden_cases", dict)
    with pytest.raises(AssertionError, match="tests/goldens/convnext5 is missing"):
        golden_case("convnext5")
    with pytest.raises(pytest.skip.Exception, match="not part of the project"):
        golden_case("elsewhere")
