"""What NVIDIA's builder makes of every preset's 0.5B sibling, on this machine, without a card.

`python -m benchmarks.rtx` exports each in fp16 with random weights, builds it for four kinds of
cards in one engine, and lists per component: layers, kernels, attentions with a kernel of their
own, weights held against weights given, the plan's size, the builder's memory and time. Then the
language model of one in 4 bits, and the encoders of COMM in static INT8 from a few photographs,
with the kernels that read codes; and one whole model in fp16, static INT8 and FP8 for sm_89 alone,
with the products that are computed in 8 bits. Needs the extra tensorrt-rtx, 12 GB of memory and
10 GB of disk. Nothing runs on a card: speed and accuracy are not shown.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Bar, Report, child, edgevlm, parser, workplace

CARDS = "tensorrt-rtx@1.7/sm_80+sm_86+sm_89+sm_120"
ADA = "tensorrt-rtx@1.7/sm_89"  # the first with FP8
CONTEXT = "1024"
IN_4_BITS, IN_INT8, IN_FP8 = "llava-qwen2-0.5b", "comm-0.5b", "llava-qwen2-0.5b"
STATICS = ("int8-static", "fp8")


def siblings() -> list[str]:
    """The 0.5B presets, listed by a child process, so that this one stays small."""
    code = "from edgevlm.toolkit import systems; print(*systems.presets())"
    names = child([sys.executable, "-c", code]).stdout.split()
    return sorted(name for name in names if "0.5b" in name)


def built(bundle: Path, engine: Path, *options: str, cards: str = CARDS) -> dict[str, Any]:
    """Plans by component, with how many kernels read codes; removes the engine."""
    done = edgevlm("build", bundle, engine, "--target", cards, "--json", *options)
    plans: dict[str, Any] = json.loads(done.stdout)["plans"]
    for name, plan in plans.items():
        listed = json.loads((engine / f"{name}.kernels.json").read_text())
        products = [k for k in listed if k["kind"] in ("gemm", "runtime_fusion", "correlation")]
        for kind in ("Int8", "FP8", "Int4"):
            plan[kind] = sum(kind in kernel["types"] for kernel in products)
    shutil.rmtree(engine)
    return plans


def measured(
    names: Sequence[str], work: Path, photos: Path | None
) -> Iterator[tuple[str, str, Any]]:
    """Preset, precision and plans of everything that is built."""
    for name in names:
        bundle, engine = work / name, work / "engine"
        options = ("--random-weights", "--dtype", "fp16", "--max-context", CONTEXT)
        edgevlm("export", f"preset:{name}", bundle, *options)
        yield name, "fp16", built(bundle, engine)
        if name == IN_4_BITS:
            yield name, "int4", built(bundle, engine, "--precision", "int4", "--accept-loss", "1")
        if name == IN_INT8 and photos is not None:
            static = work / "static"
            samples = ("--images", photos, "--to", "int8-static", "--keep-float", "lm/*")
            edgevlm("calibrate", bundle, static, *samples)
            yield name, "static int8", built(static, engine, "--accept-loss", "1")
            shutil.rmtree(static)
        if name == IN_FP8 and photos is not None:
            yield name, "fp16, sm_89", built(bundle, engine, cards=ADA)
            for to in STATICS:
                static = work / to
                edgevlm("calibrate", bundle, static, "--images", photos, "--to", to)
                found = built(static, engine, "--accept-loss", "1", cards=ADA)
                yield name, f"{to}, sm_89", found
                shutil.rmtree(static)
        shutil.rmtree(bundle)


def report(found: Sequence[tuple[str, str, Any]]) -> Report:
    """A row per component, and the bars."""
    result = Report(
        "rtx",
        (
            *("preset", "precision", "component", "layers", "kernels", "attentions fused"),
            *("held / given", "plan MB", "8-bit", "4-bit", "in 8 bits", "peak MB", "s"),
        ),
        ("edgevlm", "onnx", "tensorrt-rtx-cu13-libs"),
    )
    plans = [(name, precision, part, p) for name, precision, ps in found for part, p in ps.items()]
    for name, precision, part, plan in plans:
        result.measured[f"{name} {precision} {part}"] = plan
        result.rows.append(
            (
                name,
                precision,
                part,
                plan["layers"],
                plan["kernels"],
                f"{plan['fused_attentions']} of {plan['attentions']}",
                plan["held_weights_bytes"] / plan["given_weights_bytes"],
                plan["plan_bytes"] / 1e6,
                plan["Int8"] + plan["FP8"],
                plan["Int4"],
                f"{plan['rounded_kernels']} of {plan['rounded']}" if plan["rounded"] else "",
                plan["peak_rss_mb"],
                plan["seconds"],
            )
        )
    missed = sum(p["attentions"] - p["fused_attentions"] for *_, p in plans)
    result.bars = [Bar("attentions without a kernel of their own, fewer than 1", float(missed), 1)]
    lost = sum(p["rounded"] - p["rounded_kernels"] for *_, p in plans)
    result.bars.append(Bar("products in 8 bits that became floats, fewer than 1", float(lost), 1))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--only", help="presets, separated by commas")
    command_line.add_argument("--photos", type=Path, help="a folder of a few photographs")
    options = command_line.parse_args(arguments)
    names = options.only.split(",") if options.only else siblings()
    with workplace(options) as work:
        found = list(measured(names, work, options.photos))
        return 0 if report(found).finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
