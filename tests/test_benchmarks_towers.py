"""The benchmark of towers: what is computed from its lines, and the walk over a bundle's parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import towers
from benchmarks.compare_peers.place import Place, Unavailable
from benchmarks.tower_sides import walk
from benchmarks.towers import OURS, SIDES, TOWERS, Lines, Side
from edgevlm.toolkit import systems
from tests.conftest import HERE

GOLDEN = HERE / "goldens/e2e_llava15"


def line(cpu: float, features: tuple[float, ...] = (1.0, 2.0)) -> dict[str, Any]:
    """What a child prints, of one run."""
    lap = {"wall_s": cpu / 2, "cpu_s": cpu, "elsewhere": 0.0}
    whole = {"load_s": 0.5, "peak_rss_mb": 100.0, "positions": 576, "versions": {"it": "1"}}
    return whole | {"laps": {walk.LAP: [lap]}, "features": list(features)}


def measured(tmp_path: Path, seconds: dict[str, float]) -> Lines:
    """Lines of every side named, of the first tower."""
    lines = Lines(tmp_path / "towers.jsonl", again=False)
    for side in SIDES:
        for threads in (2, 1):
            if side.key in seconds:
                lines.add(TOWERS[0], side, threads, line(seconds[side.key]))
    return lines


def test_every_preset_exists() -> None:
    assert {tower.preset for tower in TOWERS} <= systems.presets().keys()


def test_bars_are_ours_over_the_best_of_the_others(tmp_path: Path) -> None:
    seconds = {"edgevlm float32": 9.0, "edgevlm int8": 3.0, "torch bfloat16": 6.0,
               "torch bfloat16, compiled": 4.0, "openvino int8, group 128": 2.0}  # fmt: skip
    lines = measured(tmp_path, seconds)
    options = towers.command_line().parse_args(["--json"])
    found = towers.report(lines, options, [])
    assert [(bar.measured, bar.holds) for bar in found.bars] == [(0.75, True), (1.5, False)]
    table = towers.markdown(found)
    assert len(table) == 2 + len(seconds)
    assert {text.count("|") for text in table} == {7}
    assert not found.notes


def test_what_was_measured_is_kept_unless_it_is_to_be_forgotten(tmp_path: Path) -> None:
    measured(tmp_path, {"edgevlm int8": 3.0})
    kept = Lines(tmp_path / "towers.jsonl", again=False)
    assert [row.key for row in kept.rows(TOWERS[0], 2)] == ["edgevlm int8"]
    assert kept.rows(TOWERS[1], 2) == []
    assert Lines(tmp_path / "towers.jsonl", again=True).all == []


def test_other_work_is_noted(tmp_path: Path) -> None:
    lines = measured(tmp_path, {"edgevlm float32": 9.0})
    for threads in (2, 1):
        lines.add(TOWERS[0], OURS[1], threads, line(3.0, (2.0, -1.0)))
    options = towers.command_line().parse_args(["--json"])
    (note,) = towers.report(lines, options, []).notes
    assert "edgevlm int8: features differ, cosine 0" in note


def test_a_side_that_fails_is_noted_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(place: Place, tower: Any, side: Side, *more: Any) -> dict[str, Any]:
        if side.name == "int8":
            raise Unavailable("it broke")
        return line(1.0)

    monkeypatch.setattr(towers, "child", child)
    monkeypatch.setattr(
        towers, "prepare", lambda place, tower, sides: dict.fromkeys([s.key for s in sides])
    )
    words = ["--towers", "COMM", "--only", "edgevlm", "--rounds", "1"]
    options, notes = towers.command_line().parse_args(words), list[str]()
    lines = Lines(tmp_path / "towers.jsonl", again=False)
    towers.measure(Place(tmp_path), options, lines, notes)
    assert [(one["side"], one["threads"]) for one in lines.all] == [
        ("edgevlm float32", 1), ("edgevlm float32", 2),
    ]  # fmt: skip
    assert notes == ["COMM: edgevlm int8: it broke"] * 2


def test_a_walk_runs_every_part_on_what_its_edges_say(tmp_path: Path) -> None:
    def part(name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        ports = [
            [{"name": port, "shape": shape} for port, shape in given.items()]
            for given in (inputs, outputs)
        ]
        return {"name": name, "graph": f"{name}.onnx", "inputs": ports[0], "outputs": ports[1]}

    encoder = part("encoder.a", {"pixels": ["tiles", 3, "h", "w"]}, {"x": ["tiles", "tokens", 8]})
    merger = part("merger", {"a.0": ["tiles", "tokens", 8]}, {"features": ["rows", 4]})
    ends = [("images.a", "encoder.a:pixels"), ("encoder.a:x", "merger:a.0"),
            ("merger:features", "lm:features")]  # fmt: skip
    edges = [{"source": source, "target": target} for source, target in ends]
    manifest = {"components": [encoder, merger, part("lm", {}, {})], "edges": edges}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    model = walk.read(tmp_path)
    asked: list[tuple[str, Any]] = []

    def run(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        asked.append((name, inputs))
        return {"x": 5} if name == "encoder.a" else {"features": 7}

    assert model.run(run, {"images.a": 1}) == 7
    assert asked == [("encoder.a", {"pixels": 1}), ("merger", {"a.0": 5})]
    assert model.pixels() == ["images.a"]
    assert walk.tokens(model, 768) == 144
    assert np.array_equal(walk.image(8, 1), walk.image(8, 1))
