"""What the sides share: pixels, components in order, the JSON line of a child.

A model is a bundle's folder: its manifest.json says which components there are and how they
connect, so that every side does the same work. This module needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import wait_until_quiet
from benchmarks.compare_peers.side import Lap, Line, peak_rss_mb

PRINTED = 4096  # features that name the work that was done
LAP = "vision"
Run = Callable[[str, dict[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """A component before the language model: its file and ports, with their shapes."""

    name: str
    graph: str
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]


@dataclass(frozen=True)
class Model:
    """The components in order, and where each input comes from: "PART:PORT" by "PART:PORT"."""

    parts: tuple[Part, ...]
    sources: dict[str, str]
    alone: str = ""

    @property
    def features(self) -> str:
        """What the language model reads; of a component alone its first output."""
        return f"{self.alone}:features.0" if self.alone else self.sources["lm:features"]

    def pixels(self) -> list[str]:
        """The sources that are images."""
        names = {part.name for part in self.parts}
        read = {s for t, s in self.sources.items() if t.partition(":")[0] in names}
        return sorted(s for s in read if s.startswith("images."))

    def run(self, run: Run, pixels: Mapping[str, Any]) -> Any:
        """All parts one after another; the features."""
        values = dict(pixels)
        for part in self.parts:
            inputs = {port: values[self.sources[f"{part.name}:{port}"]] for port in part.inputs}
            outputs = run(part.name, inputs)
            values |= {f"{part.name}:{port}": value for port, value in outputs.items()}
        return values[self.features]


def read(bundle: Path, alone: str = "") -> Model:
    """The model of a bundle: all in front of the language model, or one component alone."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))

    def ports(described: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {port["name"]: port["shape"] for port in described}

    parts = [
        Part(c["name"], c["graph"], ports(c["inputs"]), ports(c["outputs"]))
        for c in manifest["components"]
        if (c["name"] == alone if alone else c["name"] != "lm")
    ]
    sources = {edge["target"]: edge["source"] for edge in manifest["edges"]}
    return Model(tuple(parts), sources, alone)


def tokens(model: Model, side: int) -> int:
    """Tokens of an image; a convolutional tower's follow from its pixels, 64 a token and side."""
    (_, count, _) = next(iter(model.parts[0].outputs.values()))
    return count if isinstance(count, int) else (side // 64) ** 2


def image(side: int, number: int) -> Any:
    """Noise, [1, 3, side, side] in float32."""
    import numpy as np

    return np.random.default_rng(number).standard_normal((1, 3, side, side), np.float32)


def arguments() -> argparse.Namespace:
    """The command line of every side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--part", default="", help="one component alone")
    parser.add_argument("--side", type=int, default=336)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--patience", type=float, default=20.0)
    options = parser.parse_args()
    options.settings = dict(word.split("=", 1) for word in options.set)
    return options


Encode = Callable[[Mapping[str, Any]], Any]
Opening = Callable[[Model, argparse.Namespace], tuple[Encode, dict[str, str]]]


def measure(opening: Opening) -> None:
    """The `main` of a side: open, run once to warm up, then time; prints one line of JSON."""
    options = arguments()
    model = read(options.bundle, options.part)
    lap = Lap()
    encode, versions = opening(model, options)
    load = lap.take()
    pixels = dict.fromkeys(model.pixels(), image(options.side, 0))
    features = encode(pixels).reshape(-1)
    line = Line(load["wall_s"], load["cpu_s"], versions, tokens(model, options.side))
    step = max(features.size // PRINTED, 1)
    line.features = [round(float(x), 5) for x in features[::step]]
    for number in range(1, options.runs + 1):
        pixels = dict.fromkeys(model.pixels(), image(options.side, number))
        wait_until_quiet(options.patience)
        lap = Lap()
        encode(pixels)
        line.add(LAP, lap.take())
    line.peak_rss_mb = peak_rss_mb()
    line.print()
