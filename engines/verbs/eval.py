"""The verb `edgevlm eval`. Its options are fields of engines/evaluation/tasks.py's Request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgevlm.toolkit.terminal.flags import Debug, Json, Quiet, Threads, opened_console


def _complete(incomplete: str) -> list[str]:
    from edgevlm.engines.evaluation.tasks import TASKS

    return [name for name in ("list", *TASKS) if name.startswith(incomplete)]


_Task = Annotated[
    str,
    typer.Argument(help="What to measure; `list` shows all tasks.", autocompletion=_complete),
]
_Data = Annotated[
    Optional[Path],
    typer.Option(
        help="The samples: one JSON object a line; of a tower a folder of images by class."
    ),
]
_Images = Annotated[
    Optional[Path], typer.Option(help="Where image paths begin; default: beside the data.")
]
_Text = Annotated[Optional[Path], typer.Option(help="perplexity: a text file in UTF-8.")]
_Window = Annotated[Optional[int], typer.Option(help="perplexity: tokens read at once.")]
_Against = Annotated[Optional[str], typer.Option(help="An engine to compare with, or `reference`.")]
_Limit = Annotated[Optional[int], typer.Option(help="Take the first N samples only.")]
_MaxTokens = Annotated[Optional[int], typer.Option(help="Longest answer.")]
_Template = Annotated[Optional[str], typer.Option(help="auto, none or a name, as in `run`.")]
_Suffix = Annotated[
    Optional[str], typer.Option(help="Text behind every question; default: the task's.")
]
_Scorer = Annotated[Optional[str], typer.Option(help="refcoco: convllava or mmfuser.")]
_BoxScale = Annotated[
    Optional[float], typer.Option(help="refcoco, mmfuser: what coordinates are divided by.")
]
_SquarePad = Annotated[
    bool, typer.Option("--square-pad", help="refcoco, mmfuser: boxes are of the padded square.")
]
_MasksOf = Annotated[
    Optional[str],
    typer.Option(help="refcoco-seg: reference (the file's answer), forced ([SEG]) or free."),
]
_Channels = Annotated[
    Optional[int], typer.Option(help="recall: the first channels of an embedding that count.")
]
_Answers = Annotated[
    Optional[Path], typer.Option(help="A new file; gets each answer with its score.")
]
_Out = Annotated[Optional[Path], typer.Option(help="Write what --json prints, too.")]


def evaluate(
    context: typer.Context,
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    task: _Task,
    data: _Data = None,
    images: _Images = None,
    text: _Text = None,
    window: _Window = None,
    against: _Against = None,
    limit: _Limit = None,
    max_tokens: _MaxTokens = None,
    template: _Template = None,
    suffix: _Suffix = None,
    scorer: _Scorer = None,
    box_scale: _BoxScale = None,
    square_pad: _SquarePad = False,
    masks_of: _MasksOf = None,
    channels: _Channels = None,
    answers: _Answers = None,
    out: _Out = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score an engine on a task; the result says what it depends on."""
    given = dict(locals())
    from edgevlm.engines.evaluation import tasks

    for name in ("context", "task", "out", "as_json", "quiet", "debug"):
        del given[name]
    console = opened_console(as_json, quiet, context, threads)
    if task == "list":
        console.result(*tasks.listing())
        return
    found, scores = tasks.evaluate(task, tasks.Request(**given, progress=console.step))
    if out is not None:
        tasks.write(out, found)
    console.result(found, scores.lines)
    tasks.report_failures(scores)
