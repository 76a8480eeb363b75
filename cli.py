"""edgevlm: the command line. It parses options, calls api.py and prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from edgevlm.calibration import command as calibration
from edgevlm.toolkit.terminal.flags import (
    AcceptLoss,
    AllowBanned,
    Base,
    Bisect,
    Context,
    Debug,
    DryRun,
    For,
    Force,
    IgnoreKey,
    Json,
    KeepSlower,
    LowPrecision,
    NoRepeatNgram,
    NoTune,
    Offline,
    Quiet,
    Quirk,
    RandomWeights,
    RepetitionPenalty,
    System,
    Threads,
    Tower,
)
from edgevlm.training import command

if TYPE_CHECKING:
    from edgevlm.toolkit.terminal.console import Console

_INTERRUPTED = "interrupted; nothing half-written was left behind"

app = typer.Typer(
    help="Deploy multi-encoder vision-language models: export, build, run, profile.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _console(as_json: bool, quiet: bool, context: typer.Context | None = None) -> Console:
    """context: of a verb with steps; closing it restores the terminal, after an error too."""
    from edgevlm.toolkit.terminal.console import Console

    console = Console(quiet=quiet or as_json, as_json=as_json)
    if context is not None:
        context.call_on_close(console.close)
    return console


@app.command()
def export(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Checkpoint folder, model id, or preset:NAME.")],
    out: Annotated[Path, typer.Argument(help="The bundle to write.")],
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    max_context: Context = None,
    system: System = None,
    vision_tower: Tower = None,
    base: Base = None,
    ignore_key: IgnoreKey = None,
    quirk: Quirk = None,
    random_weights: RandomWeights = False,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    revision: Annotated[Optional[str], typer.Option(help="Revision of a model id.")] = None,
    offline: Offline = False,
    for_target: For = None,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model as a bundle: ONNX per component, safetensors, goldens."""
    from edgevlm import api
    from edgevlm.engines.build.summary import with_lowering
    from edgevlm.engines.runtime.memory import peak_rss_mb
    from edgevlm.export import available
    from edgevlm.toolkit.target import parse
    from edgevlm.toolkit.terminal import summary

    console = _console(as_json, quiet, context)
    available.check_dtype(dtype)
    if for_target is not None:
        parse(for_target)
    options = api.read_options(
        system=system,
        vision_tower=vision_tower,
        base=base,
        ignore_keys=ignore_key or (),
        quirks=quirk or (),
        max_context=max_context,
        offline=offline,
    )
    model = api.open_source(
        source,
        options,
        random_weights=random_weights,
        seed=seed,
        revision=revision,
        offline=offline,
    )
    decisions = api.lint(model, dtype, for_target)
    if dry_run:
        console.result(*with_lowering(summary.planned_bundle(model, dtype, out), decisions))
        return
    api.write_source(model, source, out, dtype=dtype, force=force, progress=console.step)
    console.result(*with_lowering(summary.written_bundle(out, peak_rss_mb()), decisions))


@app.command()
def build(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A bundle made by `export`.")],
    out: Annotated[Path, typer.Argument(help="The engine to write.")],
    target: Annotated[str, typer.Option(help="cpu, reference, a device or BACKEND/ARCH.")] = "cpu",
    max_context: Context = None,
    max_image_tiles: Annotated[
        Optional[int], typer.Option(help="Most tiles of an image; default: the model's.")
    ] = None,
    precision: LowPrecision = None,
    no_tune: NoTune = False,
    keep_slower: KeepSlower = False,
    accept_loss: AcceptLoss = None,
    bisect: Bisect = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how each op is lowered, and why.")
    ] = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile a bundle for one target and check it against its goldens."""
    from edgevlm import api
    from edgevlm.engines.build import build as builder
    from edgevlm.engines.build import summary

    console = _console(as_json, quiet, context)
    request = api.build_request(
        bundle,
        target=target,
        max_context=max_context,
        max_image_tiles=max_image_tiles,
        precision=precision,
        tune=not no_tune,
        keep_slower=keep_slower,
        accept_loss=accept_loss,
        bisect=bisect,
        force=force,
        progress=console.step,
    )
    if dry_run or (explain and not builder.builds_here(request.target)):
        console.result(*summary.planned_engine(bundle, request, explain))
        return
    engine, written = builder.build(bundle, out, request, console.step)
    console.result(*summary.built_engine(engine, out, written, explain))


@app.command()
def verify(
    context: typer.Context,
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare an engine with the reference on this machine, which has its graphics card."""
    from edgevlm.engines.build import summary
    from edgevlm.engines.build.verify import verify as compared

    console = _console(as_json, quiet, context)
    console.result(*summary.built_engine(compared(engine, console.step), engine, True, False))


@app.command()
def run(
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    prompt: Annotated[Optional[str], typer.Argument(help="The question.")] = None,
    image: Annotated[Optional[list[str]], typer.Option(help="An image file. Repeatable.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens of this total probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 is off.")] = 0,
    seed: Annotated[Optional[int], typer.Option(help="Makes sampling repeatable.")] = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram: NoRepeatNgram = None,
    allow_banned: AllowBanned = False,
    template: Annotated[
        str, typer.Option(help="auto, none (PROMPT is raw text with <image>) or a name.")
    ] = "auto",
    stop: Annotated[
        Optional[list[str]], typer.Option(help="End the answer before this text. Repeatable.")
    ] = None,
    literal: Annotated[
        bool,
        typer.Option("--literal", help="PROMPT is text alone: no control tokens, no <image>."),
    ] = False,
    input_file: Annotated[
        Optional[Path],
        typer.Option("--input", help="A file of requests, one JSON object per line."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(help="With --input: a new file; gets each answer as it comes, one a line."),
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Ask an engine a question about images; the answer streams."""
    from edgevlm.engines.runtime import batch, request_file
    from edgevlm.engines.runtime.sampling import Sampling
    from edgevlm.engines.runtime.session import Question, Session

    console = _console(as_json, quiet)
    penalties = (repetition_penalty, no_repeat_ngram, allow_banned)
    sampling = Sampling(temperature, top_k, top_p, seed, *penalties)
    given = Question(
        prompt or "", image or (), max_tokens, sampling, template, stop or (), literal=literal
    )
    batch.check_output(output, many=input_file is not None)
    requests = request_file.gather(given, input_file)
    with Session.open(engine, threads=threads) as session:
        if input_file is None:
            batch.answer_one(session, given, console)
        else:
            batch.answer_all(session, requests, console, output)


@app.command()
def profile(
    context: typer.Context,
    engine: Annotated[Path, typer.Argument(help="An engine made by `build`.")],
    image: Annotated[
        Optional[Path], typer.Option(help="An image file; default: a generated image.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens generated in each run.")] = 64,
    runs: Annotated[int, typer.Option(help="Timed runs.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before the timed ones.")] = 1,
    compare: Annotated[
        Optional[list[Path]], typer.Option(help="Another engine to measure too. Repeatable.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Show the N slowest layers.")] = 0,
    html: Annotated[Optional[Path], typer.Option(help="Write a self-contained report.")] = None,
    trace: Annotated[Optional[Path], typer.Option(help="Write a Chrome/Perfetto trace.")] = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure an engine: every stage and layer, compared with the machine's limits."""
    from edgevlm.engines.profiling import report
    from edgevlm.engines.profiling.profile import ProfileRequest, profile_all

    console = _console(as_json, quiet, context)
    request = ProfileRequest(
        image, prompt_tokens, max_tokens, runs, warmup, threads, layers=bool(layers or html)
    )
    report.check_files(layers, html, trace)
    profiles = profile_all([engine, *(compare or [])], request, console.step)
    report.write_files(profiles, html, trace)
    console.result(*report.result(profiles, layers))


@app.command()
@calibration.verb
def calibrate(**given: Any) -> None:
    from edgevlm import api

    console = _console(given.pop("as_json"), given.pop("quiet"))
    report = given.pop("report")
    found = api.calibrate(progress=console.step, **given)
    data, lines, following = calibration.summary(found, given["bundle"], given["out"])
    calibration.write_report(report, data)
    console.result(data, lines, following)


@app.command()
@command.verb
def train(**given: Any) -> None:
    from edgevlm import api

    as_json, quiet = given.pop("as_json"), given.pop("quiet")
    console = _console(as_json, quiet)
    if given["stage"] == "list":
        console.result(*command.listing())
        return
    command.require(given)
    towers = given.pop("tower") or ()
    flags = {name: value for name, value in given.items() if value is not None}
    result = api.train(towers=towers, progress=console.step, quiet=quiet or as_json, **flags)
    if result.process == 0:
        console.result(*command.summary(result))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, bundle, engine or saved profile.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Describe a checkpoint, bundle, engine or profile: components, sizes, ports, origin."""
    from edgevlm import api

    _console(as_json, quiet).result(*api.inspect(path))


@app.command()
def doctor(
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what this machine can do, what is missing, and how to install it."""
    from edgevlm import __version__
    from edgevlm.toolkit.terminal.doctor import report

    _console(as_json, quiet).result(*report(__version__))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from edgevlm import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: errors become one line and a hint; 1 for ours, 2 for usage, 130 for Ctrl-C."""
    import signal

    from edgevlm.toolkit.terminal import streams

    signal.signal(signal.SIGTERM, _interrupt)
    streams.prepare()
    code = _guarded("--debug" in sys.argv[1:])
    sys.exit(code if streams.flush() else code or 1)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _guarded(debug: bool) -> int:
    from edgevlm.toolkit.errors import ToolkitError
    from edgevlm.toolkit.terminal.failures import fail, unexpected

    try:
        code = app(standalone_mode=False)
        return fail(_INTERRUPTED, "", 130) if code == 130 else int(code or 0)
    except ToolkitError as error:
        if debug:
            raise
        return fail(error.message, error.hint, 1)
    except KeyboardInterrupt:
        return fail(_INTERRUPTED, "", 130)
    except MemoryError:
        return fail("out of memory", "lower --max-context, or use a smaller model", 1)
    except BrokenPipeError:
        return 1
    except OSError as refused:
        return fail(f"{refused.filename or 'a file'}: {refused.strerror or refused}", "", 1)
    except Exception as error:
        return unexpected(error, _INTERRUPTED, debug=debug)


if __name__ == "__main__":
    main()
