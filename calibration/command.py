"""The verb `edgevlm calibrate`: its flags, and what is printed of a result."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from edgevlm.toolkit.terminal.flags import Debug, Force, Json, Quiet

_SHOWN = 5  # of the linears
_Prompts = Annotated[
    Optional[Path],
    typer.Option(help='int8-static, fp8: a file of lines {"image": ..., "prompt": ...}.'),
]
_Images = Annotated[
    Optional[Path],
    typer.Option(help="int8-static, fp8, and all of a tower by itself: a folder of images."),
]
_Smooth = Annotated[
    Optional[float],
    typer.Option(help="int8-static, fp8, and int8 of a tower: SmoothQuant's alpha, such as 0.5."),
]
_To = Annotated[
    str,
    typer.Option(
        help="Weights: int4 (the worst layers in 8 bits) or int8. With inputs: int8-static, or fp8 "
        "for cards from sm_89 on."
    ),
]
_Budget = Annotated[
    Optional[float],
    typer.Option(
        help="How much perplexity may grow: 0.05 is 5 %, the default in int4 and int8. "
        "int8-static, fp8: leave layers in float for it. Of a tower by itself: 1 - cosine of "
        "embeddings."
    ),
]
_Method = Annotated[str, typer.Option(help="4 bits: rtn, awq, gptq or awq+gptq.")]
_ZeroPoints = Annotated[
    bool, typer.Option("--zero-points", help="4 bits: blocks have zero points of their own.")
]


def verb(run: Callable[..., None]) -> Callable[..., None]:
    """The function that typer makes the verb from; run: called with all flags by name."""

    def calibrate(
        bundle: Annotated[Path, typer.Argument(help="A float bundle made by `export`.")],
        out: Annotated[Path, typer.Argument(help="The quantized bundle to write.")],
        text: Annotated[
            Optional[Path], typer.Option(help="A text file (UTF-8) like what the model will see.")
        ] = None,
        images: _Images = None,
        prompts: _Prompts = None,
        to: _To = "int4",
        range: Annotated[
            str, typer.Option(help="int8-static, fp8: minmax, percentile, entropy or mse.")
        ] = "mse",
        smooth: _Smooth = None,
        bias_correction: Annotated[
            bool, typer.Option("--bias-correction", help="int8-static, fp8: mend the mean error.")
        ] = False,
        keep_float: Annotated[
            Optional[list[str]],
            typer.Option(
                help="int8-static, fp8, towers: leave layers in float, lm/layers.0/*. Repeatable."
            ),
        ] = None,
        samples: Annotated[int, typer.Option(help="The most images or prompts.")] = 64,
        budget: _Budget = None,
        method: _Method = "awq+gptq",
        block: Annotated[
            int, typer.Option(help="Inputs that share a scale in 4 bits: 32, 64 or 128.")
        ] = 32,
        zero_points: _ZeroPoints = False,
        window: Annotated[int, typer.Option(help="Tokens of one sample of text.")] = 256,
        windows: Annotated[
            int, typer.Option(help="The most samples of text to calibrate with.")
        ] = 24,
        measure: Annotated[
            bool, typer.Option("--measure", help="Time every component before and after, here.")
        ] = False,
        report: Annotated[Optional[Path], typer.Option(help="Write the report as JSON.")] = None,
        force: Force = False,
        as_json: Json = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Quantize a bundle with samples of text, or of images and prompts; writes a bundle."""
        given = dict(locals())
        for name in ("run", "debug"):
            given.pop(name, None)
        given["keep_float"] = tuple(keep_float or ())
        run(**given)

    return calibrate


def summary(
    result: Any, bundle: Path, out: Path, times: Sequence[Any] = ()
) -> tuple[Any, list[str], str]:
    """Data, lines and the next command of a finished calibration of `bundle` into `out`.

    times: of components in both, see edgevlm.engines.build.latency.
    """
    from edgevlm.toolkit.strict import to_plain

    data, lines, following = _summary(result, bundle, out)
    return {**data, "latency": to_plain(list(times))}, [*lines, *_times(times)], following


def _summary(result: Any, bundle: Path, out: Path) -> tuple[dict[str, Any], list[str], str]:
    from edgevlm.calibration import drift, static_report
    from edgevlm.calibration.towers import report
    from edgevlm.calibration.towers.calibrate import TowerCalibration
    from edgevlm.toolkit.bundle.manifest import Bundle
    from edgevlm.toolkit.strict import to_plain
    from edgevlm.toolkit.terminal.console import human_bytes, table

    before, written = Bundle.open(bundle).manifest, Bundle.open(out)
    sizes = {
        c.name: (before.files[c.weights].nbytes, written.manifest.files[c.weights].nbytes)
        for c in before.components
    }
    following = shlex.join(["edgevlm", "build", str(out), f"{out}-engine"])
    if isinstance(result, TowerCalibration):
        return *report.summary(result, out, sizes, following), following
    if not hasattr(result, "quality"):
        return *static_report.summary(result, out, sizes, following), following
    quality, drifts = result.quality, drift.of(written)
    data = {
        "kind": "calibration",
        "bundle": str(out),
        "method": result.plan.method,
        "components": [
            {"name": n, "bytes_before": old, "bytes_after": new, **to_plain(drifts[n])}
            for n, (old, new) in sizes.items()
        ],
        **to_plain(quality),
        "perplexity_growth": quality.growth,
        "answers": to_plain(result.answers),
        "share_4_bits": result.share_4_bits,
        "within_budget": result.within_budget,
        "layers": to_plain(result.layers),
        "next": following,
    }
    rows = [
        (
            n,
            *map(human_bytes, sizes[n]),
            f"{d.share:.0%}",
            f"{d.cosine:.5f}",
            f"{d.relative_rms:.3f}",
        )
        for n, d in drifts.items()
    ]
    columns = ("component", "weights before", "after", "in codes", "cosine", "relative rms")
    lines = [
        *table(columns, rows),
        f"perplexity       {quality.perplexity_float:.2f} -> {quality.perplexity:.2f} "
        f"({quality.growth:+.2%}), on {quality.tokens:,} tokens of held-out text",
        f"KL to float      {quality.kl:.4f}, same likeliest token {quality.same_top_1:.1%}",
        f"greedy           {result.answers.text}",
        f"in 4 bits        {result.share_4_bits:.0%} of the weights of the layers' linears",
    ]
    lines += _worst(result.layers)
    if not result.within_budget:
        lines.append("the budget does not hold: this is the best that was found")
    return data, lines, following


def _times(times: Sequence[Any]) -> list[str]:
    """A table of what components took before and after."""
    from edgevlm.toolkit.terminal.console import table

    rows = [
        (x.component, x.call, f"{x.before_ms:.2f}", f"{x.after_ms:.2f}", f"{x.speedup:.2f} x")
        for x in times
    ]
    return table(("time, ms", "call", "before", "after", "as fast"), rows) if rows else []


def _worst(layers: Sequence[Any]) -> list[str]:
    """A table of the linears with the largest errors in 4 bits: where 8 would be chosen first."""
    from edgevlm.toolkit.terminal.console import table

    worst = sorted(layers, key=lambda layer: -layer.error_4_bits)[:_SHOWN]
    rows = [(x.path, f"{x.error_4_bits:.2%}", f"{x.bits}") for x in worst if x.error_4_bits]
    return table(("largest errors", "in 4 bits", "has bits"), rows) if rows else []


def checked_report(file: Path | None) -> Path | None:
    """Where the report goes. Raises OutputError, before the work, if it cannot be written there, or
    would replace what is no report.
    """
    from edgevlm.toolkit.errors import OutputError

    if file is None:
        return None
    if file.exists() and not _is_report(file):
        raise OutputError(
            f"{file} exists and is no report of ours; it is left alone", hint="name another file"
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"{file} cannot be written", hint="name a file in a folder of yours")
    return file


def _is_report(file: Path) -> bool:
    from edgevlm.toolkit.errors import ConfigError
    from edgevlm.toolkit.strict import read_json

    try:
        return read_json(file).get("kind") == "calibration"
    except ConfigError:
        return False


def write_report(file: Path | None, data: Any) -> None:
    """The report as a JSON file, if one was asked for."""
    if file is not None:
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
