"""edgevlm: the command line. It parses options, calls api.py and prints.

Verbs that connect packages stand here; those that need an engine alone in engines/verbs/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

try:
    import typer

    from edgevlm.calibration import command as calibration
    from edgevlm.engines.verbs import batch, chat, deploy, embed, profile, run, serve, verify
    from edgevlm.engines.verbs import eval as evaluation
    from edgevlm.engines.verbs import selftest as trying
    from edgevlm.toolkit.terminal import flags
    from edgevlm.training import command
except KeyboardInterrupt:  # these take a tenth of a second
    print("error: interrupted; nothing half-written was left behind", file=sys.stderr)
    sys.exit(130)

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
    source: flags.Source,
    out: Annotated[Path, typer.Argument(help="The bundle to write.")],
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    max_context: flags.Context = None,
    system: flags.System = None,
    vision_tower: flags.Tower = None,
    base: flags.Base = None,
    ignore_key: flags.IgnoreKey = None,
    quirk: flags.Quirk = None,
    random_weights: flags.RandomWeights = False,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    revision: Annotated[Optional[str], typer.Option(help="Revision of a model id.")] = None,
    offline: flags.Offline = False,
    for_target: flags.For = None,
    heads: flags.Heads = None,
    pooling: flags.Pooling = None,
    dry_run: flags.DryRun = False,
    force: flags.Force = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Write a model as a bundle: ONNX per component, safetensors, goldens."""
    from edgevlm import api
    from edgevlm.engines.build.summary import with_lowering
    from edgevlm.engines.runtime.memory import peak_rss_mb
    from edgevlm.export import available
    from edgevlm.toolkit.target import parse
    from edgevlm.toolkit.terminal import summary

    console = flags.opened_console(as_json, quiet, context)
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
        heads=heads,
        pooling=pooling,
    )
    model = api.open_source(
        source, options, random_weights=random_weights, seed=seed, revision=revision
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
    target: Annotated[
        str,
        typer.Option(
            help="cpu, reference, a device or BACKEND/ARCH.", autocompletion=flags.complete_target
        ),
    ] = "cpu",
    max_context: flags.Context = None,
    max_image_tiles: Annotated[
        Optional[int], typer.Option(help="Most tiles of an image; default: the model's.")
    ] = None,
    precision: flags.LowPrecision = None,
    no_tune: flags.NoTune = False,
    keep_slower: flags.KeepSlower = False,
    keep_float: flags.KeepFloat = None,
    accept_loss: flags.AcceptLoss = None,
    plugins: flags.Plugins = "none",
    strip_weights: flags.StripWeights = False,
    bisect: flags.Bisect = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how each op is lowered, and why.")
    ] = False,
    dry_run: flags.DryRun = False,
    force: flags.Force = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Compile a bundle for one target and check it against its goldens."""
    from edgevlm import api
    from edgevlm.engines.build import build as builder
    from edgevlm.engines.build import summary

    console = flags.opened_console(as_json, quiet, context)
    request = api.build_request(
        bundle,
        target=target,
        max_context=max_context,
        max_image_tiles=max_image_tiles,
        precision=precision,
        tune=not no_tune,
        keep_slower=keep_slower,
        keep_float=keep_float or (),
        accept_loss=accept_loss,
        plugins=plugins,
        strip_weights=strip_weights,
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
    from edgevlm import api, requantize

    console = flags.opened_console(given.pop("as_json"), given.pop("quiet"))
    report, measure = calibration.checked_report(given.pop("report")), given.pop("measure")
    found = api.calibrate(progress=console.step, **given)
    where = given["bundle"], given["out"]
    times = requantize.latency(*where, console.step) if measure else ()
    data, lines, following = calibration.summary(found, *where, times)
    calibration.write_report(report, data)
    console.result(data, lines, following)


@app.command()
@command.verb
def train(**given: Any) -> None:
    from edgevlm import api

    as_json, quiet = given.pop("as_json"), given.pop("quiet")
    console = flags.opened_console(as_json, quiet)
    if given["stage"] == "list":
        console.result(*command.listing())
        return
    command.require(given)
    towers = given.pop("tower") or ()
    asked = {name: value for name, value in given.items() if value is not None}
    result = api.train(towers=towers, progress=console.step, quiet=quiet or as_json, **asked)
    if result.process == 0:
        console.result(*command.summary(result))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="The folder to write.")] = Path("edgevlm-demo"),
    no_train: Annotated[
        bool, typer.Option("--no-train", help="Keep random weights: without torch, in seconds.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Do again what an earlier call did in OUT.")
    ] = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Take a tiny model the whole way: train, export, calibrate, build, run, profile."""
    from edgevlm import api
    from edgevlm.training.digits import tour

    console = flags.opened_console(as_json, quiet)
    console.result(*tour.take(out, console, api.made_by(), train=not no_train, force=force))


@app.command()
@trying.verb
def selftest(**given: Any) -> None:
    from edgevlm import api

    def record(*parts: Any) -> Any:
        from edgevlm.export import available

        available.check()
        from edgevlm.export import probe

        return probe.written(*parts)

    console = flags.opened_console(given.pop("as_json"), given.pop("quiet"))
    given |= {"made_by": api.made_by(), "record": record, "progress": console.step}
    console.result(*trying.tried(**given))


@app.command()
def plan(
    source: flags.Source,
    target: Annotated[
        str,
        typer.Option(
            help="Devices with commas between; cpu: this one; all.",
            autocompletion=flags.complete_target,
        ),
    ],
    precision: Annotated[
        Optional[str], typer.Option(help="fp32, fp16, bf16, int8, int4, ...; several with commas.")
    ] = None,
    max_context: flags.Context = None,
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the image.")] = "640x480",
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the answer.")] = 64,
    system: flags.System = None,
    vision_tower: flags.Tower = None,
    base: flags.Base = None,
    ignore_key: flags.IgnoreKey = None,
    revision: Annotated[Optional[str], typer.Option(help="Revision of a model id.")] = None,
    offline: flags.Offline = False,
    heads: flags.Heads = None,
    pooling: flags.Pooling = None,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Predict memory and speed on devices that are not at hand."""
    from edgevlm import api, sizing
    from edgevlm.engines.sizing.question import Question

    console = flags.opened_console(as_json, quiet)
    reading = api.read_options(
        system=system,
        vision_tower=vision_tower,
        base=base,
        ignore_keys=ignore_key or (),
        offline=offline,
        heads=heads,
        pooling=pooling,
    )
    asked = Question(max_context, prompt_tokens, max_tokens, image_size)
    found = sizing.plan(source, target, precision, asked, reading, revision)
    console.result(*sizing.report(source, found))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, bundle, engine or saved profile.")],
    heads: flags.Heads = None,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Describe a checkpoint, bundle, engine or profile: components, sizes, ports, origin."""
    from edgevlm import api

    flags.opened_console(as_json, quiet).result(*api.inspect(path, heads))


@app.command()
def doctor(
    path: Annotated[
        Optional[Path],
        typer.Argument(help="An engine, bundle or trained checkpoint: is it as it was written?"),
    ] = None,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Show what this machine can do, or whether PATH is damaged."""
    from edgevlm import __version__
    from edgevlm.engines.build.summary import examined
    from edgevlm.engines.native import library
    from edgevlm.toolkit.terminal.doctor import report

    console = flags.opened_console(as_json, quiet)
    found = report(__version__, library.described()) if path is None else examined(path)
    console.result(*found)


# Those that need an engine alone.
for _verb in (
    run.run,
    chat.chat,
    serve.serve,
    deploy.deploy,
    profile.profile,
    verify.verify,
    embed.embed,
    batch.batch,
):
    app.command()(_verb)
app.command("eval")(evaluation.evaluate)


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
    from edgevlm.toolkit.terminal import failures, streams

    interrupts = failures.Interrupts()
    streams.prepare()
    code = _guarded("--debug" in sys.argv[1:], lambda: interrupts.came)
    interrupts.end()
    unwritten = streams.flush()
    if unwritten:
        code = failures.fail(unwritten, "", 1)
    code = code if unwritten is None else code or 1
    if "torch.distributed" in sys.modules:
        from edgevlm.training.processes import leave

        leave(code)
    if code == 130 and interrupts.came:
        failures.leave(code)
    sys.exit(code)


def _guarded(debug: bool, came: Callable[[], bool] = lambda: False) -> int:
    """The exit status of the command; came: whether an interrupt arrived, whatever became of it."""
    from edgevlm.toolkit.terminal import failures

    try:
        code = app(standalone_mode=False)
        return failures.interrupted() if code == 130 else int(code or 0)
    except BaseException as error:
        return failures.told(error, debug=debug, came=came)


if __name__ == "__main__":
    main()
