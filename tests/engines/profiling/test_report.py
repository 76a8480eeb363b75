"""A profile on paper: names are escaped, traces are JSON, figures stay what they were."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgevlm.engines.profiling import report
from edgevlm.engines.profiling.profile import LayerShare, Profile, Spread
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
    report.write_html(folder / "page.html", profiles)
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
    found: Any = json.loads(report.trace(profile(EVIL)))
    first, second, _ = found["traceEvents"]
    assert (first["name"], first["ph"], first["ts"], first["dur"]) == (EVIL, "X", 0.0, 1500.0)
    assert second["ts"] == first["ts"] + first["dur"]
    assert found["otherData"]["processor"] == EVIL


def test_lines_hold_the_figures() -> None:
    text = "\n".join(report.lines(profile("encoder.clip"), 5))
    for shown in ("1.5", "3.5", "50%", "12.0 ms", "30 prompt tokens", "2,000 tokens/s at best"):
        assert shown in text, shown
    assert "3.25" in text
    assert "3.25" not in "\n".join(report.lines(profile("encoder.clip"), 0))


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
    slow = replace(profile("b"), time_to_first_token_ms=36.0)
    data, lines = report.result([profile("a"), slow], 0)
    assert [p["engine"] for p in data["compared"]] == ["b"]
    assert any(line.split()[:3] == ["b", "36", "3"] for line in lines)
    assert "compared" not in report.result([profile("a")], 0)[0]


def test_data_are_json_and_files_are_written(tmp_path: Path) -> None:
    data, _ = report.result([profile(EVIL)], 3)
    assert json.loads(json.dumps(data))["stages"][EVIL]["p99_ms"] == 3.5
    report.write_files([profile("a")], tmp_path / "p.html", tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["displayTimeUnit"] == "ms"
    with pytest.raises(OutputError, match="cannot be written"):
        report.write_files([profile("a")], tmp_path / "no/p.html", None)
