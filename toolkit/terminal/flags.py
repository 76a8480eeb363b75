"""What several verbs of the command line share: flags, groups of them, and opening the console."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional, get_type_hints

import typer

if TYPE_CHECKING:
    from edgevlm.toolkit.terminal.console import Console


def complete_target(incomplete: str) -> list[str]:
    """Targets that begin so, after the last comma, for the shell."""
    from edgevlm.toolkit.target import DEVICES

    before, comma, last = incomplete.rpartition(",")
    names = ("cpu", "cuda", "reference", *DEVICES)
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]


def complete_source(incomplete: str) -> list[str]:
    """Presets that begin so, for the shell, which completes folders itself."""
    from edgevlm.toolkit import systems

    names = [f"preset:{name}" for name in systems.presets()]
    return [name for name in names if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace a bundle or engine at the output path.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare all files with their SHA-256 first.")
]
Threads = Annotated[int, typer.Option(help="Processor threads; 0 uses all.")]
Context = Annotated[
    Optional[int],
    typer.Option(
        "--max-context", help="Longest sequence in tokens; default: the longest possible."
    ),
]
System = Annotated[
    Optional[str],
    typer.Option("--system", help="The system to read the folder as, if it is ambiguous."),
]
Tower = Annotated[
    Optional[Path],
    typer.Option(help="The vision tower's folder or model id, if not the one of config.json."),
]
Base = Annotated[
    Optional[Path],
    typer.Option(help="Folder or model id of the base, for a LoRA adapter or a projector alone."),
]
IgnoreKey = Annotated[
    Optional[list[str]], typer.Option(help="A key of config.json to ignore. Repeatable.")
]
Quirk = Annotated[
    Optional[list[str]],
    typer.Option(help="A quirk of the original to reproduce, see docs/systems.md. Repeatable."),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Random weights for a preset, drawn from --seed.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
LongestAnswer = Annotated[int, typer.Option("--max-tokens", help="Longest answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest tokens of this total probability.")
]
TopK = Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 is off.")]
Seed = Annotated[Optional[int], typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[
    Optional[list[str]], typer.Option(help="End the answer before this text. Repeatable.")
]
RepetitionPenalty = Annotated[
    Optional[float],
    typer.Option(help="Divide the scores of tokens seen by this; default: the model's; 1 is off."),
]
NoRepeatNgram = Annotated[
    Optional[int],
    typer.Option(help="Repeat no run of N tokens; default: the model's; 0 is off."),
]
AllowBanned = Annotated[
    bool, typer.Option("--allow-banned", help="Allow the tokens that the model's settings ban.")
]
Literal = Annotated[
    bool, typer.Option("--literal", help="PROMPT is text alone: no control tokens, no <image>.")
]
Input = Annotated[
    Optional[Path], typer.Option("--input", help="A file of requests, one JSON object per line.")
]
Output = Annotated[
    Optional[Path],
    typer.Option(help="With --input: a new file; gets each answer as it comes, one a line."),
]
Masks = Annotated[
    Optional[Path],
    typer.Option(help="Write the answer's masks: OUT.png, OUT-1.png, ... (MLCD-Seg)."),
]
Overlay = Annotated[
    Optional[Path], typer.Option(help="Write the image with its masks tinted (MLCD-Seg).")
]
ForceSeg = Annotated[
    bool, typer.Option("--force-seg", help="Answer [SEG], so that there is a mask (MLCD-Seg).")
]
For = Annotated[
    Optional[str],
    typer.Option(
        "--for",
        help="Check against this target; no device needed.",
        autocompletion=complete_target,
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder, model id, bundle, or preset:NAME.", autocompletion=complete_source
    ),
]
Heads = Annotated[
    Optional[int],
    typer.Option(help="Attention heads of a tower's weight file that does not say how many."),
]
Pooling = Annotated[
    Optional[str],
    typer.Option(
        help="The embedding of a tower by itself: class, mean, class+mean, attention, ..."
    ),
]
LowPrecision = Annotated[
    Optional[str],
    typer.Option(
        help="int8 or int4, in the fastest number formats here; or int8-rows, int8-blocks, "
        "int4-blocks. No samples needed."
    ),
]
NoTune = Annotated[
    bool,
    typer.Option("--no-tune", help="Do not time the number formats of --precision here."),
]
KeepSlower = Annotated[
    bool, typer.Option("--keep-slower", help="Low precision where float is faster here, too.")
]
KeepFloat = Annotated[
    Optional[list[str]],
    typer.Option(help="Layers that --precision leaves in float: lm/*/mlp/down. Repeatable."),
]
AcceptLoss = Annotated[
    Optional[float],
    typer.Option(help="Accept this relative rms error against float, such as 0.5."),
]
Plugins = Annotated[
    str,
    typer.Option(
        help="TensorRT: ops that fused plugins compute: NAME,... or none; auto: those that "
        "selftest measured to win here."
    ),
]
StripWeights = Annotated[
    bool,
    typer.Option(
        "--strip-weights", help="TensorRT: plans without weights, which lie beside them, once."
    ),
]
Bisect = Annotated[
    bool,
    typer.Option("--bisect", help="If the engine differs from the reference, name the first op."),
]


class Drawing(NamedTuple):
    """How tokens are drawn: a group, whose fields are those of a session's Sampling."""

    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Seed = None


class Penalties(NamedTuple):
    """What changes the scores of tokens, of Sampling too."""

    repetition_penalty: RepetitionPenalty = None
    no_repeat_ngram: NoRepeatNgram = None
    allow_banned: AllowBanned = False


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """The function that typer makes the verb from: where `verb` takes a group, the flags in it.

    Groups are keyword-only, as is what follows them, and have no default but those of their fields.
    """
    groups, parameters = dict[str, Any](), list[inspect.Parameter]()
    for own in inspect.signature(verb, eval_str=True).parameters.values():
        if not hasattr(own.annotation, "_fields"):
            parameters.append(own)
            continue
        group = groups[own.name] = own.annotation
        for name, annotation in get_type_hints(group, include_extras=True).items():
            default = group._field_defaults[name]
            parameters.append(own.replace(name=name, default=default, annotation=annotation))

    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(*(given.pop(field) for field in group._fields))
        verb(**given)

    called.__name__, called.__doc__ = verb.__name__, verb.__doc__
    called.__annotations__ = {own.name: own.annotation for own in parameters}
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called


def opened_console(
    as_json: bool, quiet: bool, context: typer.Context | None = None, threads: int = 0
) -> Console:
    """context: of a verb with steps; closing it restores the terminal, after an error too.
    threads: those that were asked for; too many for this machine are told.
    """
    from edgevlm.toolkit.target import note_on_threads
    from edgevlm.toolkit.terminal.console import Console

    console = Console(quiet=quiet or as_json, as_json=as_json)
    if context is not None:
        context.call_on_close(console.close)
    if note := note_on_threads(threads):
        console.note(note)
    return console
