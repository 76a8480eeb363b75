"""Ours beside OpenVINO GenAI, llama.cpp, onnxruntime-genai and transformers, on one machine.

Installs every program in an environment of its own below --work, makes the same random LLaVA
(CLIP ViT-L/14-336, two-layer MLP, Qwen2.5-0.5B's shapes) into what each reads, and measures them
in turn, each run in a process of its own: one image of 336 pixels and 32 tokens of text in, 64
tokens out, greedy, one user. Wall seconds are of two threads; CPU seconds are the process's own
time when it has one thread, which other programs on the machine hardly change. Every program's
features of one image are compared, to see that all do the same work.

Needs 25 GB of disk, 12 GB of memory, a compiler, and the network the first time. What cannot be
installed here is named and left out. Measuring takes about 45 minutes on two quiet cores.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Report, parser, wait_until_quiet, workplace
from benchmarks.compare_peers import summary
from benchmarks.compare_peers.place import Place, Setting, Unavailable, told
from benchmarks.compare_peers.programs import OURS, PROGRAMS
from benchmarks.compare_peers.summary import VNNI, Row

PICTURE = ROOT / "docs" / "pictures" / "compare.svg"
Pair = tuple[Setting, Row]


def prepare(place: Place, only: Sequence[str], notes: list[str]) -> list[Pair]:
    """Every setting of every program that can be had here."""
    pairs = []
    for program in PROGRAMS:
        if program.name not in only:
            continue
        try:
            settings = program.prepare(place)
        except Unavailable as reason:
            notes.append(f"left out: {program.name}: {reason}")
            told(notes[-1])
            continue
        installed = program.installed_mb(place)
        for setting in settings:
            row = Row(program.name, setting.name, setting.model_mb, installed)
            pairs.append((setting, row))
    return pairs


def measure(place: Place, pairs: Sequence[Pair], options: Namespace, notes: list[str]) -> None:
    """Every setting in turn, `rounds` times, with all threads and with one; no more if it fails."""
    runs, failed = math.ceil(options.runs / options.rounds), set[str]()
    for number in range(options.rounds):
        for setting, row in pairs:
            if row.key in failed:
                continue
            told(f"round {number + 1} of {options.rounds}: {row.key}")
            try:
                for threads in dict.fromkeys((options.threads, 1)):
                    line = child(place, setting, row, threads, runs, options.patience)
                    row.lines.setdefault(threads, []).append(line)
            except Unavailable as reason:
                notes.append(f"round {number + 1}: {row.key}: {reason}")
                told(notes[-1])
                failed.add(row.key)


def child(
    place: Place, setting: Setting, row: Row, threads: int, runs: int, patience: float
) -> dict[str, Any]:
    """One process; what it measured. Lines are kept beside the models, should this be cut off."""
    wait_until_quiet(patience)
    words = [f"--set={key}={value}" for key, value in setting.words.items()]
    numbers = [f"--threads={threads}", f"--runs={runs}", f"--patience={patience}"]
    module = f"benchmarks.compare_peers.{setting.module}"
    command: list[str | Path] = [
        place.python(row.program),
        "-m",
        module,
        setting.model,
        *words,
        *numbers,
    ]
    more = setting.environment | {"OMP_NUM_THREADS": str(threads)}
    out = place.run(command, more).splitlines()
    line: dict[str, Any] = json.loads(out[-1])
    with (place.work / "lines.jsonl").open("a", encoding="utf-8") as kept:
        kept.write(json.dumps({"row": row.key, "threads": threads} | line) + "\n")
    return line


def report(rows: Sequence[Row], options: Namespace, notes: list[str]) -> Report:
    """Medians, bars and doubts; prints the tables unless JSON is asked for."""
    result = Report("compare", ("setting", "first token, s", "ms a token"), ("edgevlm", "numpy"))
    flags, medians = summary.flags(), dict[str, dict[str, float]]()
    for row in rows:
        found = row.figures(options.threads)
        result.measured[row.key] = found | row.told()
        medians[row.key] = {name: value.median for name, value in found.items()}
        result.rows.append((row.key, found["first_token"], found["token_ms"]))
    alike = summary.likeness(rows)
    bars = summary.wanted(options.ours, bool(VNNI & set(flags)))
    result.measured |= {"flags": flags, "cosine": alike, "threads": options.threads}
    cpu = {summary.named(bar): summary.ratio(bar, medians, "_cpu") for bar in bars}
    result.measured["cpu_ratios"] = {k: round(v, 3) for k, v in cpu.items() if v is not None}
    result.bars = summary.bars(bars, medians)
    result.notes = [*notes, *summary.doubts(rows, alike)]
    if not options.json:
        known = f"Processor flags: {' '.join(flags)}. Versions: {summary.versions(rows)}."
        tables = (summary.markdown(rows, options.threads, alike), summary.ratios(bars, medians))
        print(known, "", *tables[0], "", *tables[1], "", sep="\n")
    return result


def draw(rows: Sequence[Row], options: Namespace) -> None:
    """The picture, where it is asked for."""
    target: Path = PICTURE if options.save else options.picture
    drawn = summary.picture(rows, options.threads) if target else ""
    if drawn:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(drawn, encoding="utf-8")


def command_line() -> ArgumentParser:
    """Its options."""
    options, names = parser(__doc__), [program.name for program in PROGRAMS]
    options.add_argument("--only", default=",".join(names), help="programs, separated by commas")
    options.add_argument("--runs", type=int, default=6, help="measurements of each figure")
    options.add_argument("--rounds", type=int, default=2, help="processes they are spread over")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--ours", choices=OURS, default="int4", help="our setting in the bars")
    options.add_argument("--patience", type=float, default=20.0, help="wait for quiet, seconds")
    options.add_argument("--picture", type=Path, help="a file for the picture; --save: in docs")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    options, notes = command_line().parse_args(arguments), list[str]()
    only = options.only.split(",")
    unknown = set(only) - {program.name for program in PROGRAMS}
    if unknown:
        sys.exit(f"--only: no program named {', '.join(sorted(unknown))}")
    with workplace(options) as folder:
        place = Place(folder)
        pairs = prepare(place, only, notes)
        measure(place, pairs, options, notes)
        rows = [row for _, row in pairs if {options.threads, 1} <= row.lines.keys()]
        if not rows:
            sys.exit("\n".join(["nothing was measured", *notes]))
        draw(rows, options)
        return 0 if report(rows, options, notes).finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
