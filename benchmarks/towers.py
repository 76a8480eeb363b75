"""Vision towers and mergers beside torch and OpenVINO: ConvLLaVA's, COMM's and MMFuser's shapes,
and SAM ViT-H's image encoder beside transformers.

Makes each preset with random weights and a language model of one layer, builds it in float32 and
with `--precision int8`, and runs encoders and merger on the same pixels: our engines, torch with
the model's own functions (float32; bfloat16, eager and compiled), and OpenVINO on the bundle's
graphs (bfloat16, its default; float32; weights in int8 with inputs rounded in groups of 128). Each
run is a process of its own, all programs in turn. Wall seconds are of two threads; CPU seconds are
the process's own time when it has one thread, which other programs hardly change. Every program's
features are compared with those of our float32 engine. SAM's encoder is that of MLCD-Seg by
itself, lowered as a build does it but not compared with the reference, which takes minutes;
transformers' SamVisionModel gets the same weights. It takes a minute and more a run on one thread:
`--towers SAM --runs 1 --cpu-alone`.

Needs torch beside edgevlm, and the network the first time: OpenVINO is installed into an
environment of its own below --work, as `benchmarks.compare` does, and its folder may be the same.
Takes 15 GB of disk, 8 GB of memory, and an hour on two quiet cores. What was measured is kept in
WORK/towers.jsonl and not measured again; --again forgets it.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import EDGEVLM, Bar, Report, parser, spread, wait_until_quiet, workplace
from benchmarks.compare_peers import programs, summary
from benchmarks.compare_peers.place import Place, Unavailable, told
from benchmarks.compare_peers.summary import Row
from benchmarks.tower_sides.walk import LAP

EXACT = "edgevlm float32"
GROUP = {"weights": "int8", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}


@dataclass(frozen=True)
class Tower:
    """A row of the table: what it is called, the preset, pixels of a side; part: one component
    alone, in place of all in front of the language model.
    """

    name: str
    preset: str
    side: int
    part: str = ""


TOWERS = (
    Tower("ConvLLaVA 768", "convllava-0.5b-768", 768),
    Tower("ConvLLaVA 1536", "convllava-0.5b-768", 1536),  # the same tower takes any size
    Tower("COMM", "comm-0.5b", 336),
    Tower("MMFuser", "mmfuser-0.5b", 336),
    Tower("SAM ViT-H", "mlcd-seg-0.5b", 1024, "segmenter.encoder"),
)


@dataclass(frozen=True)
class Side:
    """A program with one setting. standard: whether it reads graphs of standard ops alone."""

    program: str
    name: str
    module: str
    words: dict[str, str] = field(default_factory=dict)
    standard: bool = False

    @property
    def key(self) -> str:
        """Its name in results."""
        return f"{self.program} {self.name}"


OURS = tuple(Side("edgevlm", name, "edgevlm_side") for name in ("float32", "int8"))
BFLOAT16 = ("torch bfloat16", "torch bfloat16, compiled")
TORCH = (
    Side("torch", "bfloat16", "torch_side", {"dtype": "bfloat16"}),
    Side("torch", "bfloat16, compiled", "torch_side", {"dtype": "bfloat16", "compiled": "1"}),
    Side("torch", "float32", "torch_side", {"dtype": "float32"}),
)
OPENVINO = (
    Side("openvino", "default (bf16)", "openvino_side", {}, True),
    Side("openvino", "f32 hint", "openvino_side", {"INFERENCE_PRECISION_HINT": "f32"}, True),
    Side("openvino", "int8, group 128", "openvino_side", GROUP, True),
)
TRANSFORMERS = tuple(  # of SAM alone
    Side("transformers", dtype, "transformers_side", {"dtype": dtype})
    for dtype in ("bfloat16", "float32")
)
SIDES = (*OURS, *TORCH, *TRANSFORMERS, *OPENVINO)


# -- preparing -----------------------------------------------------------------------------------


def prepare(place: Place, tower: Tower, sides: Sequence[Side]) -> dict[str, tuple[Path, list[str]]]:
    """By side: the folder that it reads, and its settings; made again when our sources change."""
    key, make = programs.sources(), "benchmarks.tower_sides.make"
    home, python = place.work / "towers" / tower.preset, place.python("edgevlm")
    if tower.part:
        return _prepare_part(place, tower, sides)
    bundle = place.once(
        home / "bundle", lambda out: _done(place.run([python, "-m", make, tower.preset, out])), key
    )
    found: dict[str, tuple[Path, list[str]]] = {}
    for side in sides:
        folder, words = bundle, [f"--set={k}={v}" for k, v in side.words.items()]
        if side.standard:
            command: list[str | Path] = [python, "-m", make, "--graphs", bundle]
            folder = place.once(home / "standard", partial(_run, place, command), key)
        if side.program == "edgevlm":
            exact = side.name == "float32"
            more = () if exact else ("--precision", side.name, "--accept-loss", "1")
            command = [*EDGEVLM, "build", *more, "--quiet", bundle]
            engine = place.once(home / side.name, partial(_run, place, command), key)
            words.append(f"--set=engine={engine}")
        found[side.key] = folder, words
    return found


def _prepare_part(
    place: Place, tower: Tower, sides: Sequence[Side]
) -> dict[str, tuple[Path, list[str]]]:
    """The same for one component by itself, in float32 and in int8."""
    home, make = place.work / "towers" / tower.preset, "benchmarks.tower_sides.make"
    folders = {}
    for precision in ("float32", "int8"):
        words = ["-m", make, "--part", tower.preset, tower.part, precision]
        command: list[str | Path] = [place.python("edgevlm"), *words]
        folders[precision] = place.once(
            home / precision, partial(_run, place, command), programs.sources()
        )
    found: dict[str, tuple[Path, list[str]]] = {}
    for side in sides:
        words = [f"--set={k}={v}" for k, v in side.words.items()]
        if side.program == "edgevlm":
            words.append(f"--set=engine={folders[side.name]}")
        found[side.key] = folders["float32"], words
    return found


def _run(place: Place, command: Sequence[str | Path], out: Path) -> None:
    place.run([*command, out])


def _done(output: str) -> None:
    return None


# -- measuring -----------------------------------------------------------------------------------


class Lines:
    """What children printed, by tower, side and threads; kept in a file."""

    def __init__(self, file: Path, again: bool) -> None:
        self._file = file
        if again:
            file.unlink(missing_ok=True)
        kept = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.all: list[dict[str, Any]] = [json.loads(text) for text in kept]

    def of(self, tower: Tower, side: Side, threads: int) -> list[dict[str, Any]]:
        """Of one setting."""
        wanted = {"tower": tower.name, "side": side.key, "threads": threads}
        return [line for line in self.all if wanted.items() <= line.items()]

    def add(self, tower: Tower, side: Side, threads: int, line: dict[str, Any]) -> None:
        """One more."""
        line |= {"tower": tower.name, "side": side.key, "threads": threads}
        self.all.append(line)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rows(self, tower: Tower, threads: int) -> list[Row]:
        """The sides that were measured with one thread; their lines with more may be missing."""
        rows = []
        for side in SIDES:
            lines = {n: self.of(tower, side, n) for n in (1, threads)}
            if lines[1]:
                rows.append(Row(side.program, side.name, 0, 0, lines))
        return rows


def measure(place: Place, options: Namespace, lines: Lines, notes: list[str]) -> None:
    """Every tower: all sides in turn, with all threads and with one; what fails is noted."""
    asked, left_out = options.only.split(","), options.without.split(",")
    sides = [s for s in SIDES if s.key.startswith(tuple(asked))]
    sides = [s for s in sides if not any(word and word in s.key for word in left_out)]
    if any(side.program == "openvino" for side in sides):
        programs.install_openvino(place)
    for tower in [t for t in TOWERS if t.name.startswith(tuple(options.towers.split(",")))]:
        apart = (*TORCH, *OPENVINO) if tower.part else TRANSFORMERS
        own = [s for s in sides if s not in apart]
        folders = prepare(place, tower, own)
        runs = max(options.runs // (2 if tower.side > 1000 else 1), 1)
        for number in range(options.rounds):
            for side in own:
                for threads in (1,) if options.cpu_alone else (1, options.threads):
                    if len(lines.of(tower, side, threads)) > number:
                        continue
                    told(f"round {number + 1}: {tower.name}: {side.key}, {threads} threads")
                    try:
                        line = child(place, tower, side, folders[side.key], threads, runs, options)
                        lines.add(tower, side, threads, line)
                    except Unavailable as reason:
                        notes.append(f"{tower.name}: {side.key}: {reason}")
                        told(notes[-1])


def child(
    place: Place,
    tower: Tower,
    side: Side,
    where: tuple[Path, list[str]],
    threads: int,
    runs: int,
    options: Namespace,
) -> dict[str, Any]:
    """One process; what it measured."""
    wait_until_quiet(options.patience)
    program = "openvino" if side.program == "openvino" else "edgevlm"
    command: list[str | Path] = [place.python(program), "-m"]
    command += [f"benchmarks.tower_sides.{side.module}", where[0], *where[1]]
    numbers = {"side": tower.side, "threads": threads, "runs": runs, "patience": options.patience}
    command += [f"--{name}={value}" for name, value in numbers.items()]
    command += [f"--part={tower.part}"] if tower.part else []
    out = place.run(command, {"OMP_NUM_THREADS": str(threads)}).splitlines()
    line: dict[str, Any] = json.loads(out[-1])
    return line


# -- reporting -----------------------------------------------------------------------------------


def report(lines: Lines, options: Namespace, notes: list[str]) -> Report:
    """Medians, features beside ours in float32, bars; the table for docs/performance.md."""
    columns = ("tower", "program", "CPU s", "wall s", "peak MB")
    result = Report("towers", columns, ("edgevlm", "onnxruntime", "torch", "transformers", "numpy"))
    for tower in TOWERS:
        rows = lines.rows(tower, options.threads)
        alike, cpu = summary.likeness(rows), dict[str, float]()
        found: dict[str, Any] = {}
        for row in rows:
            one = spread(row.laps(1, LAP, "cpu_s"))
            laps = row.laps(options.threads, LAP, "wall_s")
            wall, whole = spread(laps) if laps else None, row.figures(1)
            found[row.key] = {
                "cpu_s": one,
                "wall_s": wall,
                "peak_rss_mb": whole["peak_rss_mb"],
                "cosine": alike.get(row.key),
                "versions": row.told()["versions"],
            }
            cpu[row.key] = one.median
            result.rows.append((tower.name, row.key, one, wall or "–", whole["peak_rss_mb"]))
        if found:
            result.measured[tower.name] = found
        result.bars += bars(tower, cpu)
        result.notes += [f"{tower.name}: {text}" for text in differing(alike)]
    result.notes += notes
    if not options.json:
        print(*markdown(result), "", sep="\n")
    return result


def bars(tower: Tower, cpu: dict[str, float]) -> list[Bar]:
    """Ours in int8 over torch's best in bfloat16, and over OpenVINO's best."""
    found, ours = [], cpu.get("edgevlm int8")
    best = {
        "torch bfloat16": [cpu[key] for key in BFLOAT16 if key in cpu],
        "transformers": [cpu[s.key] for s in TRANSFORMERS if s.key in cpu],
        "OpenVINO's default": [cpu[s.key] for s in OPENVINO[:1] if s.key in cpu],
        "OpenVINO's int8": [cpu[s.key] for s in OPENVINO[2:] if s.key in cpu],
    }
    for name, others in best.items():
        if ours is not None and others:
            what = f"{tower.name}, CPU s of one thread: edgevlm int8 / {name}"
            found.append(Bar(what, round(ours / min(others), 3), 1.0))
    return found


def differing(alike: dict[str, float]) -> list[str]:
    """Notes on sides that do not compute the same."""
    return [f"{key}: features differ, cosine {c:g}" for key, c in alike.items() if c < summary.SAME]


def markdown(result: Report) -> list[str]:
    """The table of all rows."""
    lines = [
        "| tower | program | CPU s, one thread | wall s, two threads | peak MB | cosine |",
        "|---|---|---|---|---|---|",
    ]
    for tower, sides in result.measured.items():
        for key, found in sides.items():
            like = "" if found["cosine"] is None else f"{found['cosine']:.4f}"
            peak = f"{found['peak_rss_mb'].median:,.0f}"
            cells = (tower, key, found["cpu_s"], found["wall_s"] or "–", peak, like)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def command_line() -> ArgumentParser:
    """Its options."""
    options = parser(__doc__)
    names = ",".join(tower.name for tower in TOWERS)
    options.add_argument("--towers", default=names, help="what their names begin with")
    every = "edgevlm,torch,transformers,openvino"
    options.add_argument("--only", default=every, help="what sides begin with")
    options.add_argument("--without", default="", help="parts of names of sides to leave out")
    options.add_argument("--runs", type=int, default=3, help="of a process; half at 1536 pixels")
    options.add_argument("--rounds", type=int, default=2, help="processes of each setting")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--patience", type=float, default=20.0, help="wait for quiet, seconds")
    options.add_argument("--cpu-alone", action="store_true", help="one thread alone, no wall times")
    options.add_argument("--again", action="store_true", help="forget what was measured before")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    options, notes = command_line().parse_args(arguments), list[str]()
    with workplace(options) as folder:
        lines = Lines(folder / "towers.jsonl", options.again)
        measure(Place(folder), options, lines, notes)
        return 0 if report(lines, options, notes).finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
