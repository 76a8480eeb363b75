"""What connects the packages: the functions that the command line and Python programs call.

`cli.py` parses and prints, the packages do the work and never import one another; here one
package's result is handed to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgevlm.calibration import calibrate as calibrating
    from edgevlm.engines.build.build import Request
    from edgevlm.engines.lowering.capabilities import Decision
    from edgevlm.engines.manifest import Engine
    from edgevlm.toolkit.bundle.manifest import Bundle
    from edgevlm.toolkit.checkpoints.layouts.source import AnySource, Options, Source
    from edgevlm.toolkit.quantization.plan import PrecisionPlan
    from edgevlm.training.run import Result

Progress = Callable[[str], None]


def made_by() -> str:
    """What artifacts say about the program that wrote them."""
    from edgevlm import __version__

    return f"edgevlm {__version__}"


def read_options(
    *,
    system: str | None = None,
    image_size: int | None = None,
    vision_tower: str | Path | None = None,
    ignore_keys: Sequence[str] = (),
    quirks: Sequence[str] = (),
    max_context: int | None = None,
    offline: bool = False,
    base: str | Path | None = None,
    heads: int | None = None,
    pooling: str | None = None,
) -> Options:
    """How a checkpoint is to be read; torch files too, where torch is installed.

    vision_tower: a folder, a weight file or a model id. base: a folder or a model id. offline:
    download neither. heads, pooling: of a vision tower by itself.
    """
    from edgevlm.toolkit.checkpoints.layouts.source import Options
    from edgevlm.training import torch_files

    return Options(
        system,
        None if vision_tower is None else Path(vision_tower),
        tuple(ignore_keys),
        max_context,
        torch_files.reader(),
        tuple(quirks),
        offline,
        None if base is None else Path(base),
        heads=heads,
        pooling=pooling,
    )


def open_source(
    source: str | Path,
    options: Options,
    *,
    random_weights: bool = False,
    seed: int = 0,
    revision: str | None = None,
) -> AnySource:
    """A checkpoint folder, a tower's folder or weight file, a model id, a bundle, or preset:NAME
    with random weights. A model id is downloaded unless `options.offline`.

    Raises ConfigError, CheckpointError or BundleError.
    """
    from edgevlm.toolkit import systems
    from edgevlm.toolkit.bundle import trained
    from edgevlm.toolkit.checkpoints import hub

    text = str(source)
    systems.check_weights(text, random_weights)
    name = text.removeprefix("preset:")
    if name != text:
        return systems.any_preset(name, seed, options)
    folder = hub.locate_model(text, revision=revision, offline=options.offline)
    return systems.load_any(trained.verified(folder), options)


def export_bundle(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "fp32",
    max_context: int | None = None,
    system: str | None = None,
    vision_tower: str | Path | None = None,
    base: str | Path | None = None,
    ignore_keys: Sequence[str] = (),
    quirks: Sequence[str] = (),
    random_weights: bool = False,
    seed: int = 0,
    revision: str | None = None,
    offline: bool = False,
    target: str | None = None,
    heads: int | None = None,
    pooling: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write `source` as the bundle `out`, as `edgevlm export` does, and open it.

    source: a checkpoint folder, a tower's weight file, a model id or preset:NAME. target: refuse
    what that target cannot run. heads, pooling: of a vision tower by itself. Raises ToolkitError;
    nothing half-written stays.
    """
    from edgevlm.export import available
    from edgevlm.toolkit.bundle.manifest import Bundle

    available.check_dtype(dtype)
    options = read_options(
        system=system,
        vision_tower=vision_tower,
        base=base,
        ignore_keys=ignore_keys,
        quirks=quirks,
        max_context=max_context,
        offline=offline,
        heads=heads,
        pooling=pooling,
    )
    model = open_source(
        source,
        options,
        random_weights=random_weights,
        seed=seed,
        revision=revision,
    )
    lint(model, dtype, target)
    write_source(model, source, out, dtype=dtype, force=force, progress=progress)
    return Bundle.open(Path(out))


def write_source(
    model: AnySource,
    source: str | Path,
    out: str | Path,
    *,
    dtype: str,
    force: bool,
    progress: Progress | None,
) -> None:
    """Write an opened source as a bundle; `source` is where it was read from."""
    from edgevlm.export import write
    from edgevlm.toolkit.bundle.atomic import refuse_source

    refuse_source(Path(out), Path(source))
    write.write_bundle(
        model,
        Path(out),
        dtype=dtype,
        made_by=made_by(),
        force=force,
        progress=progress or _silent,
    )


def lint(model: AnySource, dtype: str, target: str | None) -> list[Decision]:
    """How a target would lower an opened source. Raises UnsupportedError for what it lacks."""
    if target is None:
        return []
    from edgevlm.engines.build import build
    from edgevlm.export import write
    from edgevlm.toolkit.target import parse

    return build.lint(write.graphs(model, dtype), parse(target))


def build_request(
    bundle: str | Path,
    *,
    target: str = "cpu",
    max_context: int | None = None,
    max_image_tiles: int | None = None,
    precision: str | None = None,
    tune: bool = True,
    keep_slower: bool = False,
    keep_float: Sequence[str] = (),
    accept_loss: float | None = None,
    plugins: str = "none",
    strip_weights: bool = False,
    bisect: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Request:
    """The request of `edgevlm build`; `precision` adds the recorder of the requantized model."""
    from edgevlm import requantize
    from edgevlm.engines.backends import BuildOptions
    from edgevlm.engines.build.build import Request
    from edgevlm.engines.build.plugins import chosen
    from edgevlm.toolkit.target import parse

    parsed = parse(target)
    taken = chosen(plugins, Path(bundle), parsed, progress or _silent, precision)
    how = requantize.How(tune, keep_slower, tuple(keep_float))
    options = BuildOptions(taken, strip_weights)
    requantization, tuning = requantize.chosen(
        Path(bundle), precision, parsed, progress or _silent, made_by(), how
    )
    chosen_here = requantization, accept_loss, tuning, options
    return Request(parsed, max_context, force, made_by(), max_image_tiles, bisect, *chosen_here)


def build_engine(
    bundle: str | Path,
    out: str | Path,
    *,
    target: str = "cpu",
    max_context: int | None = None,
    max_image_tiles: int | None = None,
    precision: str | None = None,
    tune: bool = True,
    keep_slower: bool = False,
    keep_float: Sequence[str] = (),
    accept_loss: float | None = None,
    plugins: str = "none",
    strip_weights: bool = False,
    bisect: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """Build a bundle into the engine `out`, as `edgevlm build` does; what engine.json holds.

    tune: time number formats on this machine, see docs/cli.md. keep_slower: low precision where
    float is faster, too. keep_float: globs over paths of layers that `precision` leaves in float.
    accept_loss: the relative rms error against the float model that rounded weights may have, in
    place of the limit of `precision`; beyond it the build raises AccuracyError. plugins:
    "NAME,...", "none" or "auto". An engine of the same bundle and options that exists at `out` is
    kept. Raises ToolkitError; nothing half-written stays.
    """
    from edgevlm.engines.build.build import build

    request = build_request(
        bundle,
        target=target,
        max_context=max_context,
        max_image_tiles=max_image_tiles,
        precision=precision,
        tune=tune,
        keep_slower=keep_slower,
        keep_float=keep_float,
        accept_loss=accept_loss,
        plugins=plugins,
        strip_weights=strip_weights,
        bisect=bisect,
        force=force,
        progress=progress,
    )
    engine, _ = build(Path(bundle), Path(out), request, progress or _silent)
    return engine


def calibrate(
    bundle: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    images: str | Path | None = None,
    prompts: str | Path | None = None,
    to: str = "int4",
    force: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> calibrating.Result:
    """Quantize a float bundle with samples, as `edgevlm calibrate` does.

    settings: see edgevlm.calibration.samples.Settings. Writes the bundle `out`; what was found.
    Raises ToolkitError; an interrupted one goes on when the same is asked again.
    """
    from edgevlm.calibration import calibrate as calibration
    from edgevlm.calibration import unfinished
    from edgevlm.calibration.pictures import Given
    from edgevlm.calibration.samples import Settings
    from edgevlm.export import available
    from edgevlm.training import forward

    available.check()
    from edgevlm.export import write

    given = Given(*(None if file is None else Path(file) for file in (images, prompts, text)))
    say, target, name = progress or _silent, Path(out), made_by()
    where = (Path(bundle), target, given, Settings(to, **settings))
    with unfinished.beside(target, name) as kept:
        source, found = calibration.of_bundle(*where, forward.interpreter(), say, force, kept)
        options: dict[str, Any] = {"dtype": found.dtype, "force": force, "progress": say}
        write.write_bundle(source, target, made_by=name, **options)
    return found


def train(
    stage: str,
    model: str,
    out: str | Path,
    *,
    resume: bool = False,
    config: str | Path | None = None,
    towers: Sequence[str] = (),
    system: str | None = None,
    image_size: int | None = None,
    vision_tower: str | Path | None = None,
    ignore_key: Sequence[str] = (),
    original: str | Path | None = None,
    random_weights: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
    quiet: bool = True,
    **flags: Any,
) -> Result:
    """Run a training stage, as `edgevlm train` does; what it came to.

    model: a checkpoint folder, a model id or preset:NAME; with towers ("clip=FOLDER") the language
    model of a new one, of `system` or of the stage's first; for a stage of a vision tower see
    edgevlm.training.towers.models.open_tower. config: a file with options; flags: fields of
    TrainOptions and TowerOptions in edgevlm.training. original: also write the result there, in the
    model's published layout. Raises ToolkitError; a killed run can be resumed.
    """
    from edgevlm.training import restore, stages
    from edgevlm.training.assemble import from_parts
    from edgevlm.training.towers import options as tower_options
    from edgevlm.training.towers.train import TowerRequest, TowerStage, train_tower
    from edgevlm.training.train import Request, train

    known, say = stages.find(stage), progress or _silent
    chosen, own = tower_options.read(config, flags)
    if isinstance(known, TowerStage):
        tower_options.refuse_flags({
            "--tower": towers, "--system": system, "--vision-tower": vision_tower,
            "--original": original, "--random-weights": random_weights,
        }, stage)  # fmt: skip
        where = (Path(out), chosen, own, image_size, resume, made_by(), say, quiet)
        return train_tower(TowerRequest(stage, model, *where, tuple(ignore_key), offline))
    tower_options.refuse_for_vlm(own, stage)
    reading = read_options(
        system=None if towers else system,
        vision_tower=vision_tower,
        ignore_keys=ignore_key,
        offline=offline,
    )
    source = (
        from_parts(known, model, towers, system, image_size, chosen.seed, reading)
        if towers
        else _begun(model, reading, random_weights=random_weights, seed=chosen.seed)
    )
    plan = _plan(chosen.qat) if chosen.qat else None
    request = Request(stage, model, source, Path(out), chosen, resume, made_by(), say, plan, quiet)
    result = train(request)
    if original is not None and result.process == 0:  # the others end before it is written
        restore.write_run(Path(original), Path(out), model, reading, say)
    return result


def _begun(model: str, options: Options, *, random_weights: bool, seed: int) -> Source:
    """The model that a run begins with; its origin remembers the folder."""
    from dataclasses import replace

    from edgevlm.toolkit.checkpoints.layouts.source import with_language_model

    opened = open_source(model, options, random_weights=random_weights, seed=seed)
    source = with_language_model(opened, model)
    if random_weights:
        return source
    return replace(source, origin={"folder": model, **source.origin})


def _plan(qat: str) -> PrecisionPlan:
    from edgevlm.calibration import weight_only

    return weight_only.plan_of(qat, option="--qat")


def inspect(path: Path, heads: int | None = None) -> tuple[Any, list[str]]:
    """What a path is: data, and lines for people. Raises BundleError if it is nothing we know.

    heads: of a tower's weight file that does not say it.
    """
    from edgevlm.engines import manifest
    from edgevlm.engines.build import summary as engine_summary
    from edgevlm.toolkit.terminal import summary

    if (path / manifest.DESCRIPTION).exists():
        return engine_summary.inspect_engine(path)
    return summary.inspect(path, read_options(heads=heads, offline=True))


def _silent(message: str) -> None:
    return None
