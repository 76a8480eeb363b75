"""What writing a bundle costs: time, and memory, which decides which machine can do it.

`preset:llava-1.5-7b` in fp16 (13.5 GB of weights go to disk) and `preset:llava-qwen2-0.5b` in
fp32; `--all` exports every preset in fp16. Beside them, where it is installed: onnxruntime-genai's
builder on the language model of the 0.5B preset, which is half of the work. A bundle is removed
once it is measured; the largest needs 16 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import peers
from benchmarks.common import (
    Bar,
    Finished,
    Report,
    child,
    edgevlm,
    parser,
    version,
    wait_until_quiet,
    workplace,
)

LARGE, SMALL = "llava-1.5-7b", "llava-qwen2-0.5b"


@dataclass(frozen=True)
class Exported:
    """One export: what was written, and what it took."""

    name: str
    dtype: str
    done: Finished
    written_gb: float


def export(name: str, dtype: str, work: Path) -> Exported:
    """Export a preset, look at its size, remove it."""
    out = work / f"{name}-{dtype}"
    wait_until_quiet(20)
    done = edgevlm("export", f"preset:{name}", out, "--random-weights", "--dtype", dtype, "--json")
    written = json.loads(done.stdout)["bytes"] / 1e9
    shutil.rmtree(out)
    return Exported(name, dtype, done, written)


def presets() -> list[str]:
    """All presets, listed by a child process, so that this one stays small."""
    code = "from edgevlm.toolkit import systems; print(*systems.presets())"
    return child([sys.executable, "-c", code]).stdout.split()


def exports(options: argparse.Namespace, work: Path) -> Iterator[Exported]:
    """The two presets that bars exist for, or all."""
    if options.all:
        yield from (export(name, "fp16", work) for name in presets())
    else:
        yield export(LARGE, "fp16", work)
    yield export(SMALL, "fp32", work)


def genai_builder(work: Path, threads: int = 2) -> Finished | None:
    """onnxruntime-genai on the small preset's language model; None if it is not installed."""
    if not (version("transformers") and version(peers.GENAI_PACKAGE)):
        return None
    checkpoint, out = work / "checkpoint", work / "genai"
    peers.make("checkpoint", str(checkpoint))
    wait_until_quiet(20)
    done = child(peers.builder_command(checkpoint, out))
    for folder in (checkpoint, out):
        shutil.rmtree(folder)
    return done


def report(exported: Sequence[Exported], peer: Finished | None) -> Report:
    """A row per export, and the bars."""
    result = Report(
        "export",
        ("preset", "weights", "written GB", "seconds", "peak MB", "others' share"),
        ("edgevlm", "numpy", "onnx", peers.GENAI_PACKAGE, "torch"),
    )
    for e in exported:
        numbers = (e.written_gb, e.done.seconds, e.done.peak_rss_mb, e.done.elsewhere)
        names = ("written_gb", "seconds", "peak_rss_mb", "elsewhere")
        result.measured[f"{e.name} {e.dtype}"] = {
            n: round(x, 3) for n, x in zip(names, numbers, strict=True)
        }
        result.rows.append((e.name, e.dtype, *numbers))
    small = next(e for e in exported if (e.name, e.dtype) == (SMALL, "fp32"))
    large = next(e for e in exported if (e.name, e.dtype) == (LARGE, "fp16"))
    most = max(exported, key=lambda e: e.done.peak_rss_mb)
    result.bars = [
        Bar(f"{LARGE} fp16, peak MB", large.done.peak_rss_mb, 2000),
        Bar(f"{SMALL} fp32, seconds", small.done.seconds, 30),
        Bar(f"any of {len(exported)}, peak MB ({most.name})", most.done.peak_rss_mb, 3000),
    ]
    if peer is None:
        result.notes = [f"skipped, not installed: {peers.GENAI_PACKAGE}"]
        return result
    cost = (peer.seconds, peer.peak_rss_mb, peer.elsewhere)
    result.rows.append(("peer, its language model", "fp32", "-", *cost))
    ratios = {
        "seconds": small.done.seconds / peer.seconds,
        "peak_rss_mb": small.done.peak_rss_mb / peer.peak_rss_mb,
    }
    what = f"{SMALL} / {peers.GENAI_PACKAGE} on its language model alone"
    result.measured[what] = {name: round(x, 3) for name, x in ratios.items()}
    result.bars.append(Bar(f"peak memory, {what}", ratios["peak_rss_mb"], 1.0))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--all", action="store_true", help="every preset, about half an hour")
    options = command_line.parse_args(arguments)
    with workplace(options) as work:
        exported = list(exports(options, work))
        return 0 if report(exported, genai_builder(work)).finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
