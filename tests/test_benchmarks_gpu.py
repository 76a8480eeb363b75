"""make gpu: one part's failure or time does not take the others with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import gpu


def test_every_part_runs_whatever_the_one_before_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    (tmp_path / "finds.py").write_text("import edgevlm.toolkit.target, sys; print(sys.argv[1])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "PARTS", (("fails", ()), ("finds", ("word",))))
    assert gpu.main([]) == 1
    ended = capsys.readouterr().out.splitlines()[-2:]
    assert ended == ["fails: failed", "finds: ok"]
    monkeypatch.setattr(gpu, "PARTS", (("sleeps", ()),))
    assert gpu.main(["--seconds", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "sleeps: out of time"


def test_the_parts_exist() -> None:
    import importlib.util

    assert sys.version_info >= (3, 10)
    for module, _ in gpu.PARTS:
        assert importlib.util.find_spec(module) is not None, module
