"""The comparison with other programs: what is computed from their lines, not the programs."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare
from benchmarks.compare_peers import side, summary
from benchmarks.compare_peers.place import Place, Setting, Unavailable
from benchmarks.compare_peers.programs import PROGRAMS, Program
from benchmarks.compare_peers.side import Opened
from benchmarks.compare_peers.summary import Row
from benchmarks.scatter import Point, scatter

OURS, THEIRS = "edgevlm int4", "openvino int8, group 128"


def line(first: float, cpu: float, features: tuple[float, ...] = (1.0, 2.0)) -> dict[str, Any]:
    """What a child prints, of one run."""
    lap = {"wall_s": first, "cpu_s": cpu, "elsewhere": 0.0}
    laps = {"encoder": [lap], "first_token": [lap], "token": [lap]}
    whole = {"load_s": 0.5, "peak_rss_mb": 100.0, "positions": 608, "versions": {"it": "1"}}
    return whole | {"laps": laps, "features": list(features)}


def rows() -> list[Row]:
    """Ours, twice as fast as theirs on one thread, three times on two."""
    ours = Row("edgevlm", "int4", 1.0, 2.0, {2: [line(1.0, 9.0)], 1: [line(9.0, 2.0)]})
    exact = Row("edgevlm", "float32", 1.0, 2.0, {2: [line(1.0, 9.0)], 1: [line(9.0, 2.0)]})
    theirs = Row("openvino", "int8, group 128", 1.0, 2.0, {2: [line(3.0, 9.0)]})
    theirs.lines[1] = [line(9.0, 4.0)]
    return [ours, exact, theirs]


def test_wall_figures_are_of_all_threads_and_cpu_figures_of_one() -> None:
    found = rows()[0].figures(2)
    assert found["first_token"].median == 1.0
    assert found["first_token_cpu"].median == 2.0
    assert found["token_ms"].median == 1000.0


def test_bars_of_what_was_measured() -> None:
    medians = {
        row.key: {name: value.median for name, value in row.figures(2).items()} for row in rows()
    }
    wanted = summary.wanted("int4", vnni=True)
    bars = summary.bars(wanted, medians)
    assert [round(bar.measured, 3) for bar in bars] == [0.333, 0.333]
    assert all(bar.limit == 0.8 and bar.holds for bar in bars)
    assert summary.ratio(wanted[0], medians, "_cpu") == 0.5
    table = summary.ratios(wanted, medians)
    assert len(table) == 4 and table[2].endswith("| <= 0.8 | 0.33 | 0.50 |")


def test_a_rate_is_the_inverse_of_a_time_and_beats_the_best() -> None:
    four = [name for bar in summary.wanted("int4", True) if bar.at_least for name in bar.others][:2]
    medians = {OURS: {"token_ms": 10.0}, four[0]: {"token_ms": 12.0}, four[1]: {"token_ms": 20.0}}
    (bar,) = summary.bars(summary.wanted("int4", True), medians)
    assert bar.measured == 1.2 and bar.holds


def test_every_bar_names_rows_of_a_program() -> None:
    names = {program.name for program in PROGRAMS}
    for bar in summary.wanted("int4", False):
        assert all(any(row.startswith(name + " ") for name in names) for row in bar.others)


def test_a_program_that_does_other_work_is_noted() -> None:
    measured = rows()
    measured[2].lines[2][0]["features"] = [2.0, -1.0]
    measured[2].lines[1][0]["features"] = [2.0, -1.0]
    measured[2].lines[2][0]["positions"] = 32
    alike = summary.likeness(measured)
    assert alike[THEIRS] == 0 and alike[OURS] == 1
    notes = summary.doubts(measured, alike)
    assert len(notes) == 2 and "cosine 0" in notes[0] and "32 positions" in notes[1]


def test_the_table_has_a_cell_for_every_column() -> None:
    table = summary.markdown(rows(), 2, {})
    assert len(table) == 5
    assert {text.count("|") for text in table} == {table[0].count("|")}


def test_the_picture_is_svg_with_every_name_inside() -> None:
    points = [Point(f"group {i % 3}", f"point <{i}>", 1 + i / 10, 50 + i % 4) for i in range(12)]
    root = ElementTree.fromstring(scatter("title", "x", "y", points))
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {p.name for p in points} <= set(texts)
    assert all(0 < float(e.get("y", "0")) < 480 for e in root.iter() if e.tag.endswith("text"))


def test_what_exists_is_made_again_only_with_another_key(tmp_path: Path) -> None:
    place, made = Place(tmp_path), list[Path]()

    def make(out: Path) -> None:
        out.write_text("x")
        made.append(out)

    for key in ("a", "a", "b"):
        assert place.once(tmp_path / "file", make, key).read_text() == "x"
    assert len(made) == 2


def test_a_command_that_fails_is_told_without_folders(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="ValueError: no") as told:
        Place(tmp_path).run([sys.executable, "-c", "raise ValueError('no')"])
    assert str(Path(sys.executable).parent) not in str(told.value)


def test_a_program_that_cannot_be_had_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(place: Place) -> list[Setting]:
        raise Unavailable("no network")

    monkeypatch.setattr(compare, "PROGRAMS", (Program("openvino", none, lambda place: 0.0),))
    notes: list[str] = []
    assert compare.prepare(Place(tmp_path), ["openvino"], notes) == []
    assert notes == ["left out: openvino: no network"]


def test_a_setting_that_fails_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def child(place: Place, setting: Setting, row: Row, threads: int, *more: Any) -> dict[str, Any]:
        asked.append(f"{row.name} {threads}")
        if row.name == "bad" and threads == 1:
            raise Unavailable("it broke")
        return line(1.0, 1.0)

    monkeypatch.setattr(compare, "child", child)
    options = compare.command_line().parse_args(["--rounds", "2"])
    pairs = [(Setting(n, "it", tmp_path), Row("it", n, 1.0, 1.0)) for n in ("good", "bad")]
    notes: list[str] = []
    compare.measure(Place(tmp_path), pairs, options, notes)
    assert asked == ["good 2", "good 1", "bad 2", "bad 1", "good 2", "good 1"]
    assert notes == ["round 1: it bad: it broke"]
    assert pairs[1][1].lines.keys() == {2}


def test_a_child_measures_answers_and_the_encoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def opening(options: Any) -> Opened:
        def answer(number: int, tokens: int, first: Any) -> None:
            asked.append(number)
            first()

        features = np.ones((side.IMAGE_TOKENS, 128), np.float32)
        return Opened(
            answer, {"it": "1"}, lambda: 608, lambda: lambda number: None, lambda: features
        )

    monkeypatch.setattr(sys, "argv", ["side", "model", "--runs", "2", "--patience", "0"])
    side.measure(opening)
    printed = capsys.readouterr().out
    assert asked == [0, 1, 2]
    assert '"positions": 608' in printed and printed.count('"wall_s"') == 6
