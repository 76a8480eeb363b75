"""A profile on paper: names are escaped, traces are JSON, figures stay what they were."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgevlm.engines.profiling import drawings, report, tables
from edgevlm.engines.profiling import page as pages
from edgevlm.engines.profiling.drift import Drift
from edgevlm.engines.profiling.metrics import Distribution
from edgevlm.engines.profiling.profile import LayerShare, Profile, Spread
from edgevlm.engines.profiling.report import Files
from edgevlm.engines.profiling.roofline import Bound, Roofline
from edgevlm.engines.runtime.clock import Span
from edgevlm.toolkit.errors import OutputError

EVIL = "<script>alert('x')</script>&\"é🙂"
SPREAD = Spread(1.5, 2.5, 3.5, 1.75)


def profile(name: str) -> Profile:
    bounds = (
        Bound(name, 1.0, 0.5, 0.0, 0.75, name, 0.5),
        Bound("decode", 0.1, 0.2, 0.05, 0.5, "memory", 0.4),
    )
    return Profile(
        engine=name,
        stages={name: SPREAD, "prefill": SPREAD, "decode": SPREAD},
        time_to_first_token_ms=12.0,
        inter_token_latency_ms=1.5,
        output_token_throughput=600.0,
        output_token_throughput_per_user=650.0,
        prefill_tokens_per_s=5000.0,
        load_ms=100.0,
        peak_rss_mb=200.0,
        prompt_tokens=30,
        image_tokens=20,
        generated_tokens=4,
        roofline=Roofline(50.0, 200.0, 10.0, bounds),
        device={"processor": name, "threads": "2", "target": name, "precision": "fp32"},
        samples={name: [1.5, 1.5], "prefill": [1.0, 2.0], "decode": [1.5, 1.6, 1.4]},
        layers=(LayerShare(name, name, name, 3.25, 2),),
        spans=(Span(name, 0.0, 1.5), Span("prefill", 1.5, 2.0), Span("decode", 3.5, 1.5)),
        metrics={name: Distribution("ms", 1.5, 0.25, 1.0, 1.5, 1.75, 1.8, 1.9, 2.0, 7)},
        context={"governor": name, "versions": {name: None}},
        memory=((0.0, 50.0), (20.0, 150.0), (40.0, 200.0)),
        memory_marks=((0.0, "opening"), (20.0, name)),
        size_bytes=3_000_000,
    )


class Page(HTMLParser):
    """Collects tags, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(profiles: list[Profile], folder: Path) -> Page:
    (folder / "page.html").write_text(pages.as_html(profiles), encoding="utf-8")
    return Page((folder / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("count", [1, 2])
def test_names_are_escaped_and_shown(count: int, tmp_path: Path) -> None:
    page = page_of([profile(EVIL)] * count, tmp_path)
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 5 * count
    assert page.tags.count("svg") >= 2 * count
    assert {"table", "rect", "polyline"} <= set(page.tags)


def test_a_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page_of([profile("engine")], tmp_path)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "src=" not in text


def test_odd_measurements_can_be_drawn(tmp_path: Path) -> None:
    still = replace(profile("engine"), layers=(), spans=(Span("prefill", 0.0, 0.0),))
    still = replace(still, samples={"prefill": [0.0], "decode": [0.0]})
    assert "nan" not in page_of([still], tmp_path).text.lower()


def test_a_trace_is_json_in_microseconds() -> None:
    found: Any = json.loads(tables.trace(profile(EVIL)))
    first, second, *_ = found["traceEvents"]
    assert (first["name"], first["ph"], first["ts"], first["dur"]) == (EVIL, "X", 0.0, 1500.0)
    assert second["ts"] == first["ts"] + first["dur"]
    assert found["otherData"]["processor"] == EVIL
    held = [event for event in found["traceEvents"] if event["ph"] == "C"]
    assert [(e["ts"], e["args"]["resident_mb"]) for e in held][1] == (20000.0, 150.0)


def test_lines_hold_the_figures() -> None:
    text = "\n".join(report.lines(profile("encoder.clip"), 5))
    for shown in ("1.5", "3.5", "50%", "12.0 ms", "30 prompt tokens", "2,000 tokens/s at best"):
        assert shown in text, shown
    assert "3.25" in text
    assert "3.25" not in "\n".join(report.lines(profile("encoder.clip"), 0))


def test_a_loaded_machine_is_told_wherever_figures_are(tmp_path: Path) -> None:
    busy = replace(profile("engine"), context={"load_average": 9.5, "processors": 2})
    told = "9.5 runnable programs on 2 processors"
    report.write_files([busy], Files(tmp_path / "p.html", markdown=tmp_path / "p.md"))
    for text in (
        "\n".join(report.lines(busy, 0)),
        page_of([busy], tmp_path).text,
        (tmp_path / "p.md").read_text(encoding="utf-8"),
    ):
        assert told in text
    assert "runnable" not in "\n".join(report.lines(profile("engine"), 0))


def test_floors_show_what_limits_them_and_the_part_of_the_cache(tmp_path: Path) -> None:
    shown = profile("encoder.clip")
    rows = [line.split() for line in report.lines(shown, 0)]
    decode = next(row for row in rows if row[:1] == ["decode"])
    assert decode[-3:] == ["0.5", "40%", "(memory)"]
    text = "\n".join(report.lines(shown, 0))
    assert "0.2 GB of weights and KV cache a token at the measured 10 GB/s" in text
    table = page_of([shown], tmp_path).text
    assert "GB movedof it KV cachefloor ms" in table
    assert "decode0.10.20.050.5memory40%" in table


def test_a_stage_without_a_floor_is_shown_without_one() -> None:
    rows = [line.split() for line in report.lines(profile("encoder.clip"), 0)]
    assert ["prefill", "1.5", "2.5", "3.5", "12%"] in rows


def test_engines_are_compared_with_the_first() -> None:
    slow = replace(profile("b"), time_to_first_token_ms=36.0, drift=Drift(0.125, 0.75, 4))
    data, lines = report.result([profile("a"), slow], 0)
    assert [p["engine"] for p in data["compared"]] == ["b"]
    row = "b fp32 3 MB 0.125 75% 36 3 1.5 1 200".split()
    assert any(line.split() == row for line in lines)
    assert "compared" not in report.result([profile("a")], 0)[0]


def test_data_are_json_and_files_are_written(tmp_path: Path) -> None:
    data, _ = report.result([profile(EVIL)], 3)
    assert json.loads(json.dumps(data))["stages"][EVIL]["p99_ms"] == 3.5
    report.write_files([profile("a")], Files(tmp_path / "p.html", tmp_path / "t.json"))
    assert json.loads((tmp_path / "t.json").read_text())["displayTimeUnit"] == "ms"
    with pytest.raises(OutputError, match="cannot be written"):
        report.write_files([profile("a")], Files(tmp_path / "no/p.html"))


def test_metrics_come_back_from_csv_and_markdown(tmp_path: Path) -> None:
    files = Files(csv=tmp_path / "p.csv", markdown=tmp_path / "p.md")
    report.write_files([profile(EVIL), profile("b|c")], files)
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["engine"] for row in rows] == [EVIL] * 4 + ["b|c"] * 4
    assert (rows[0]["metric"], rows[0]["unit"], rows[0]["p95"]) == (EVIL, "ms", "1.8")
    assert (rows[3]["metric"], rows[3]["mean"]) == ("engine_size", "3000000")
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    assert "<script" not in text
    bars = [re.sub(r"\\\|", "", line).count("|") for line in text.splitlines() if "|" in line]
    assert set(bars) == {11, 6}  # every row has as many cells as its head


def test_the_page_stays_small_with_many_tokens_and_samples(tmp_path: Path) -> None:
    long = replace(
        profile("engine"),
        samples={"prefill": [1.0], "decode": [1.0 + n % 7 for n in range(50_000)]},
        memory=tuple((float(n), 100.0 + n % 9) for n in range(4_000)),
        layers=tuple(LayerShare("lm", f"lm/{n}", "MatMul", 1.0, 64) for n in range(3_000)),
        spans=tuple(Span("decode", float(n), 0.9) for n in range(2_000)),
    )
    page_of([long] * 3, tmp_path)
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def test_the_roofline_has_a_dot_for_each_measured_stage(tmp_path: Path) -> None:
    page = page_of([profile("encoder.clip")], tmp_path)
    assert page.tags.count("circle") == 2  # the encoder and decode; prefill has no floor here
    assert "50 G/s in float" in page.text
    assert "200 G/s in 8 bits" in page.text
    unknown = replace(profile("encoder.clip"), roofline=Roofline(0.0, 0.0, 0.0, ()))
    assert drawings.roofline([unknown]) == ""
