"""The tasks of `edgevlm eval`: a table of what each needs, and the result with its provenance.

A task is a module of this package with `run(request)`, which gives its `Scores`. Modules are
imported when their task is asked for.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

from edgevlm.engines import backends, manifest
from edgevlm.toolkit.errors import ConfigError, InputError, OutputError, nearest
from edgevlm.toolkit.target import card, processor_name, threads_here

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A row of the table. about: one line for people; module: of this package.

    needs: options that must be given; takes: options that may be given besides. Names are fields
    of Request; `limit` and `threads` are taken by every task.
    """

    about: str
    module: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


_ASKED = ("images", "max_tokens", "template", "suffix", "answers")
TASKS: Mapping[str, Task] = {
    "agreement": Task(
        "greedy tokens and next-token distributions beside another engine or the reference",
        "agreement",
        ("against",),
        ("data", "max_tokens", "template"),
    ),
    "perplexity": Task(
        "of a text; with --against also the divergence from another engine",
        "perplexity",
        ("text",),
        ("window", "against"),
    ),
    "vqa": Task("VQA accuracy of short answers", "vqa", ("data",), _ASKED),
    "pope": Task("yes or no: accuracy, precision, recall, F1", "pope", ("data",), _ASKED),
    "refcoco": Task(
        "boxes of described regions: the share that hits",
        "refcoco",
        ("data",),
        (*_ASKED, "scorer", "box_scale", "square_pad"),
    ),
    "refcoco-seg": Task(
        "masks of described regions: cIoU and gIoU",
        "masks",
        ("data",),
        ("images", "max_tokens", "template", "masks_of"),
    ),
    "recall": Task(
        "a tower: Recall@1 of classes, or of query and gallery",
        "retrieval",
        ("data",),
        ("channels",),
    ),
    "knn": Task(
        "a tower: weighted nearest neighbours, classes of train and test", "knn", ("data",)
    ),
    "probe": Task("a tower: logistic regression, classes of train and test", "probe", ("data",)),
}


def _silent(message: str) -> None:
    return None


@dataclass(frozen=True)
class Request:
    """What is asked; None, False and () are options that were not given, which tasks default.

    data: samples, one JSON object a line, or a folder of images by class; images: the folder
    where paths begin. text: a file in UTF-8; window: tokens read at once. against: an engine's
    folder, or "reference". limit: the first so many samples. suffix: text behind every
    question. answers: a new file for each answer and its score. scorer, box_scale, square_pad:
    see refcoco.py. masks_of: see masks.py's ANSWERS. channels: of an embedding, the first that
    count. threads: 0 for all.
    """

    engine: Path
    data: Path | None = None
    images: Path | None = None
    text: Path | None = None
    window: int | None = None
    against: str | None = None
    limit: int | None = None
    max_tokens: int | None = None
    template: str | None = None
    suffix: str | None = None
    answers: Path | None = None
    scorer: str | None = None
    box_scale: float | None = None
    square_pad: bool = False
    masks_of: str | None = None
    channels: int | None = None
    threads: int = 0
    progress: Progress = _silent

    def options(self) -> dict[str, Any]:
        """Those that were given, by name."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "progress"}
        del plain["engine"]
        given = {name: value for name, value in plain.items() if value not in (None, False, ())}
        return {n: str(v) if isinstance(v, Path) else v for n, v in given.items()}


@dataclass(frozen=True)
class Scores:
    """What a task found. values: the keys of --json; lines: the same for people.

    files: what was read, for the record; settings: the options as they were used, with the task's
    defaults; failed: samples that could not be answered, each with its reason.
    """

    values: Mapping[str, Any]
    lines: tuple[str, ...]
    files: tuple[Path, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    failed: tuple[str, ...] = ()


def find(name: str) -> Task:
    """The row of a task. Raises ConfigError with the nearest names."""
    if name in TASKS:
        return TASKS[name]
    close = nearest(name, TASKS) or list(TASKS)
    raise ConfigError(f"there is no task {name!r}", hint=f"known: {', '.join(close)}")


def check(name: str, request: Request) -> None:
    """Raise ConfigError or InputError for options that the task lacks, does not take, or that
    cannot be, before anything is opened.
    """
    task, given = find(name), request.options()
    for option in task.needs:
        if option not in given:
            raise ConfigError(f"the task {name} needs {_flag(option)}", hint=_usage(name, task))
    foreign = set(given) - {*task.needs, *task.takes, "limit", "threads"}
    if foreign:
        flags = ", ".join(map(_flag, sorted(foreign)))
        raise ConfigError(f"the task {name} does not take {flags}", hint=_usage(name, task))
    for option, least in (("limit", 1), ("max_tokens", 1), ("window", 2)):
        value = getattr(request, option)
        if value is not None and value < least:
            raise InputError(f"{_flag(option)} {value} is less than {least}")
    if request.answers is not None and request.answers.exists():
        raise OutputError(f"{request.answers} exists", hint="choose another name, or remove it")


def evaluate(name: str, request: Request) -> tuple[dict[str, Any], Scores]:
    """Run a task: the object that --json prints, and the scores. Raises ToolkitError."""
    check(name, request)
    began = datetime.now(timezone.utc)
    module = import_module(f"{__package__}.{find(name).module}")
    scores: Scores = module.run(request)
    seconds = (datetime.now(timezone.utc) - began).total_seconds()
    data = {
        "kind": "evaluation",
        "task": name,
        "engine": str(request.engine),
        **scores.values,
        "failed": len(scores.failed),
        "provenance": provenance(request, scores)
        | {"began": began.isoformat(timespec="seconds"), "seconds": round(seconds, 3)},
    }
    return data, scores


def provenance(request: Request, scores: Scores) -> dict[str, Any]:
    """What a score depends on: the engine and the files by digest, versions, the processor."""
    engine = manifest.read(request.engine)
    target = engine.parsed_target()
    found: dict[str, Any] = {
        "engine_sha256": digest(request.engine / manifest.DESCRIPTION),
        "bundle_sha256": engine.bundle_sha256,
        "target": engine.target,
        "precision": engine.precision or engine.dtype,
        "files": {str(file): digest(file) for file in scores.files},
        "options": {**request.options(), **scores.settings},
        "edgevlm": str(import_module("edgevlm").__version__),
        "backend": ".".join(map(str, backends.backend(target).here().version)),
        "processor": processor_name(),
        "threads": request.threads or threads_here(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if target.arch.startswith("sm_"):
        found["card"] = card.name() or "?"
    if request.against not in (None, "reference"):
        other = Path(str(request.against)) / manifest.DESCRIPTION
        found["against_sha256"] = digest(other)
    return found


def digest(file: Path) -> str:
    """The SHA-256 of a file's bytes. Raises InputError if it cannot be read."""
    found = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                found.update(piece)
    except OSError as refused:
        raise InputError(f"{file} cannot be read: {refused.strerror}") from None
    return found.hexdigest()


def write(file: Path, data: Mapping[str, Any]) -> None:
    """Keep a result. Raises OutputError if the file cannot be written."""
    try:
        file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as refused:
        raise OutputError(f"{file} cannot be written: {refused.strerror}") from None


def report_failures(scores: Scores) -> None:
    """Name the samples that failed on stderr. Raises InputError if there are any."""
    for reason in scores.failed:
        print(f"failed: {reason}", file=sys.stderr)
    if scores.failed:
        raise InputError(
            f"{len(scores.failed)} samples could not be answered and are not in the scores",
            hint="mend the lines named above",
        )


def listing() -> tuple[dict[str, Any], list[str]]:
    """All tasks: data and lines of `edgevlm eval ENGINE list`."""
    from edgevlm.toolkit.terminal.console import table

    rows = [
        (name, task.about, " ".join(map(_flag, task.needs)), " ".join(map(_flag, task.takes)))
        for name, task in TASKS.items()
    ]
    data = {"tasks": [{"task": row[0], "about": row[1]} for row in rows]}
    return data, table(("task", "what", "needs", "takes"), rows)


def with_defaults(request: Request, **defaults: Any) -> Request:
    """The request with a task's defaults where nothing was given."""
    lacking = {k: v for k, v in defaults.items() if getattr(request, k) is None}
    return replace(request, **lacking)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _usage(name: str, task: Task) -> str:
    needed = "".join(f" {_flag(option)} ..." for option in task.needs)
    optional = ", ".join(map(_flag, (*task.takes, "limit", "threads")))
    return f"edgevlm eval ENGINE {name}{needed}; it also takes {optional}"
