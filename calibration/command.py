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
    from edgevlm.calibration import report, static_report, weight_report
    from edgevlm.calibration.static import StaticCalibration
    from edgevlm.calibration.towers import report as tower_report
    from edgevlm.calibration.towers.calibrate import TowerCalibration
    from edgevlm.toolkit.bundle.manifest import Bundle

    before, written = Bundle.open(bundle).manifest, Bundle.open(out)
    sizes = {
        c.name: (before.files[c.weights].nbytes, written.manifest.files[c.weights].nbytes)
        for c in before.components
    }
    if isinstance(result, TowerCalibration):
        told = tower_report.told(result)
    elif isinstance(result, StaticCalibration):
        told = static_report.told(result, tuple(sizes))
    else:
        told = weight_report.told(result, written)
    following = shlex.join(["edgevlm", "build", str(out), f"{out}-engine"])
    budget = result.within_budget
    return *report.whole(told, result.plan, budget, out, sizes, following), following


def _times(times: Sequence[Any]) -> list[str]:
    """A table of what components took before and after."""
    from edgevlm.toolkit.terminal.console import table

    rows = [
        (x.component, x.call, f"{x.before_ms:.2f}", f"{x.after_ms:.2f}", f"{x.speedup:.2f} x")
        for x in times
    ]
    return table(("time, ms", "call", "before", "after", "as fast"), rows) if rows else []


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
