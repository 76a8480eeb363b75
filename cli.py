"""edgevlm: the command line. It parses options, calls api.py and prints.

Verbs that connect packages stand here; those that need an engine alone in engines/verbs/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from edgevlm.calibration import command as calibration
from edgevlm.engines.verbs import chat, deploy, profile, run, serve, verify
from edgevlm.toolkit.terminal.flags import (
    AcceptLoss,
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
    NoTune,
    Offline,
    Quiet,
    Quirk,
    RandomWeights,
    System,
    Tower,
    opened_console,
)
from edgevlm.training import command

_INTERRUPTED = "interrupted; nothing half-written was left behind"

app = typer.Typer(
    help="Deploy multi-encoder vision-language models: export, build, run, profile.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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

    console = opened_console(as_json, quiet, context)
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

    console = opened_console(as_json, quiet, context)
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
@calibration.verb
def calibrate(**given: Any) -> None:
    from edgevlm import api

    console = opened_console(given.pop("as_json"), given.pop("quiet"))
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
    console = opened_console(as_json, quiet)
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

    opened_console(as_json, quiet).result(*api.inspect(path))


@app.command()
def doctor(
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what this machine can do, what is missing, and how to install it."""
    from edgevlm import __version__
    from edgevlm.toolkit.terminal.doctor import report

    opened_console(as_json, quiet).result(*report(__version__))


# Those that need an engine alone.
for _verb in (
    run.run,
    chat.chat,
    serve.serve,
    deploy.deploy,
    profile.profile,
    verify.verify,
):
    app.command()(_verb)


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
