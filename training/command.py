"""The verb `edgevlm train`: its flags are the fields of TrainOptions, and what names its files."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from edgevlm.toolkit.terminal.flags import Debug, IgnoreKey, Json, Offline, Quiet, Tower
from edgevlm.training.options import TrainOptions
from edgevlm.training.towers.options import TowerOptions

_OWN: dict[str, tuple[Any, Any]] = {
    "stage": (
        Annotated[str, typer.Argument(help="A training stage; list shows them all.")],
        inspect.Parameter.empty,
    ),
    "model": (
        Annotated[
            Optional[str],
            typer.Option(
                help="Checkpoint, model id or preset:NAME; with --tower a language model; "
                "for a tower stage a tower."
            ),
        ],
        None,
    ),
    "out": (Annotated[Optional[Path], typer.Option("--out", "-o", help="The new folder.")], None),
    "config": (
        Annotated[Optional[Path], typer.Option(help="YAML or JSON with these options; flags win.")],
        None,
    ),
    "resume": (Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")], False),
    "tower": (
        Annotated[
            Optional[list[str]],
            typer.Option(help="KIND=FOLDER: make a new model with this tower. Repeatable."),
        ],
        None,
    ),
    "system": (Annotated[Optional[str], typer.Option(help="The system of a new model.")], None),
    "image_size": (
        Annotated[
            Optional[int],
            typer.Option(help="Side of the images of a tower stage, or of a new ConvLLaVA."),
        ],
        None,
    ),
    "vision_tower": (Tower, None),
    "ignore_key": (IgnoreKey, None),
    "original": (
        Annotated[
            Optional[Path],
            typer.Option(
                help="Write the result in the model's published layout too: a new folder."
            ),
        ],
        None,
    ),
    "random_weights": (
        Annotated[bool, typer.Option("--random-weights", help="For a preset: from --seed.")],
        False,
    ),
    "offline": (Offline, False),
    "as_json": (Json, False),
    "quiet": (Quiet, False),
    "debug": (Debug, False),
}


def verb(run: Callable[..., None]) -> Callable[..., None]:
    """The function that typer makes the verb from; run: called with all flags by name.

    Flags of TrainOptions and TowerOptions that were not given are None.
    """

    def train(**given: Any) -> None:
        given.pop("debug")
        run(**given)

    typed = dict(_OWN)
    for kind, panel in ((TrainOptions, None), (TowerOptions, "Stages of vision towers")):
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            flag = _flag(field.name, hints[field.name], field.default, panel)
            typed[field.name] = (flag, None)
    train.__doc__ = "Train a stage of a published system, or a vision tower; `train list`: stages."
    train.__annotations__ = {name: annotation for name, (annotation, _) in typed.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, keyword, default=default, annotation=annotation)
            for name, (annotation, default) in typed.items()
        ]
    )
    return train


def _flag(name: str, hint: Any, default: Any, panel: str | None) -> Any:
    """A field of the options as typer declares an option; a switch only turns on."""
    kind, explanation = typing.get_args(hint)
    given = "--" + name.replace("_", "-")
    shown = "" if default in (None, (), False) else f" Default: {default}."
    option = typer.Option(given, help=explanation + shown, rich_help_panel=panel)
    return Annotated[Optional[_typer_type(kind)], option]


def _typer_type(kind: Any) -> Any:
    """tuple[str, ...] is a list there, a Literal a text, and None is said by Optional."""
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) is tuple:
        return list[str]
    if typing.get_origin(kind) is Literal:
        return str
    return _typer_type(arguments[0]) if arguments else kind


def require(given: dict[str, Any]) -> None:
    """Raise ConfigError unless a model and a folder for the result were named."""
    from edgevlm.toolkit.errors import ConfigError

    for name in ("model", "out"):
        if given[name] is None:
            flag = "--model M" if name == "model" else "-o OUT"
            raise ConfigError(
                f"train needs {flag}", hint="edgevlm train STAGE --model M --data D -o OUT"
            )


def listing() -> tuple[Any, list[str]]:
    """What `edgevlm train list` prints: every stage, as data and as a table."""
    from edgevlm.toolkit.terminal.console import table
    from edgevlm.training import stages

    rows = stages.listed()
    columns = ("stage", "systems", "rate", "batch", "purpose")
    cells = [
        (row.name, ", ".join(row.systems) or "any", f"{row.rate:g}", row.batch, row.purpose)
        for row in rows
    ]
    return rows, table(columns, cells)


def summary(result: Any) -> tuple[Any, list[str], str]:
    """What is printed of a finished run, and the command that follows it."""
    losses = [x for x in (result.first_loss, result.last_loss) if x is not None]
    lines = [
        f"stage            {result.stage}",
        f"trained          {result.trained_parameters:,} of {result.parameters:,} parameters",
        f"steps            {result.steps:,}",
        f"seen             {result.samples:,} samples, {result.targets:,} targets",
    ]
    if losses:
        lines.append(f"loss             {' -> '.join(f'{loss:.4f}' for loss in losses)}")
    if result.eval_loss is not None:
        right = result.eval_image_accuracy if result.tower else result.eval_token_accuracy
        accuracy = f"{right:.1%} of {'images' if result.tower else 'tokens'} right"
        lines.append(f"held out         loss {result.eval_loss:.4f}, {accuracy}")
    lines += [f"faulty samples   {kind}: {count}" for kind, count in result.faults.items()]
    if result.processes > 1:
        lines.append(f"processes        {result.processes} ({result.distribution})")
    lines += [
        f"time             {result.seconds:,.1f} s, peak {result.peak_rss_mb:,.0f} MB",
        f"checkpoint       {result.out}",
    ]
    following = f"edgevlm export {result.out} BUNDLE"
    if result.tower is not None:
        lines[-1] = f"tower            {result.out} ({result.tower})"
        tower = f"--tower {result.tower}={result.out}"
        following = f"edgevlm train STAGE --model LANGUAGE_MODEL {tower} --data D -o MODEL"
    return result, lines, "" if result.tower == "unicom" else following
