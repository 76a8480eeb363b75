"""From a bundle to an engine for one target: lower, compile, check the answers, or refuse."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import Backend, BuildOptions, Compiled, PlanReport, Plugin, Shapes
from edgevlm.engines.build import check, native, plugins, second_form, shapes
from edgevlm.engines.build.kept import existing
from edgevlm.engines.build.second_form import SecondForm
from edgevlm.engines.lowering import capabilities
from edgevlm.engines.lowering.capabilities import Decision
from edgevlm.engines.lowering.given import of_bundle
from edgevlm.engines.manifest import Built, Engine, PromptForm, Trial
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.memory import peak_rss_mb
from edgevlm.toolkit.bundle import checksums
from edgevlm.toolkit.bundle.atomic import (
    recover,
    refuse_existing,
    refuse_source,
    require_space,
    writing,
)
from edgevlm.toolkit.bundle.manifest import GOLDENS, TOKENIZER, Bundle, FileRecord, record_file
from edgevlm.toolkit.errors import (
    ConfigError,
    MissingExtra,
    TargetMismatch,
    UnsupportedError,
)
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.target import Target, check_runs_here, threads_here
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.cost import stored_bytes

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str], None]
_GRAPHS_BYTES = 64_000_000  # graphs, tokenizer and manifest are smaller together


@dataclass(frozen=True)
class Requantization:
    """The bundle's model in another precision: its plan, how to write it, and its graphs alone."""

    name: str
    plan: PrecisionPlan
    write: Callable[[Path], None]
    graphs: Callable[[], Mapping[str, onnx.ModelProto]]


@dataclass(frozen=True)
class Tuning:
    """How the number formats of an engine were chosen.

    options: that say so, as given; trials: what was timed; notes: what came of it, for the user.
    prompts: the language model a second time. native: kernels of ours by component.
    """

    options: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()
    prompts: SecondForm | None = None
    native: Mapping[str, tuple[Plugin, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What is to be built.

    context: positions of the KV cache, None for the bundle's. tiles: the most tiles that an image
    is cut into, None for all that the model knows. bisect: on divergence, look for the first op.
    requantization: the model in another precision than the bundle's. accept_loss: the relative rms
    error against the float model that is accepted, None for the precision's own limit. tuning: how
    the number formats of the precision, or of the bundle, were chosen. options: of TensorRT.
    """

    target: Target
    context: int | None
    force: bool
    made_by: str
    tiles: int | None = None
    bisect: bool = False
    requantization: Requantization | None = None
    accept_loss: float | None = None
    tuning: Tuning = Tuning()
    options: BuildOptions = BuildOptions()

    def plan(self, bundle: Bundle) -> PrecisionPlan:
        """The plan of the engine."""
        return self.requantization.plan if self.requantization else bundle.manifest.plan

    @property
    def precision(self) -> str | None:
        """The name of the requested precision, None for the bundle's own."""
        return self.requantization.name if self.requantization else None


def build(path: Path, out: Path, request: Request, progress: Progress) -> tuple[Engine, bool]:
    """Build the bundle `path` into the engine `out`; returns it, and whether it was built now.

    An engine of the same bundle, target and context that already exists at `out` is kept.
    Raises UnsupportedError, BuildError, AccuracyError, TargetMismatch, BundleError, OutputError.
    """
    started = time.perf_counter()
    bundle = Bundle.open(path)
    context, model = settled(bundle, request)
    allowed = check.allowed_loss(request.plan(bundle), request.accept_loss)
    backend, elsewhere = _backend_for(request.target, path, out, request.options)
    recover(out)
    current = existing(bundle, out, request, context, model)
    if current is not None:
        return current, False
    refuse_source(out, path)
    refuse_existing(out, force=request.force)
    for note in request.tuning.notes:
        progress(note)
    progress("checking the bundle's files")
    bundle.verify()
    require_space(out, _new_bytes(bundle, request))
    memory.require_component(bundle, request.plan(bundle), request.target)
    with writing(out, force=request.force) as folder, ExitStack() as stack:
        source = bundle
        if request.requantization is not None:
            source = stack.enter_context(_requantized(request.requantization, folder))
        config = towers.from_json(dict(model), "model")
        sizes = partial(shapes.of, model=config, context=context)
        parts = _parts(source, backend, folder, request, sizes, allowed, elsewhere, progress)
        seconds = time.perf_counter() - started
        engine = _described(path, folder, bundle, source, request, context, model, parts, seconds)
        manifest.write(folder, engine)
    return engine, True


def _described(
    path: Path,
    folder: Path,
    bundle: Bundle,
    source: Bundle,
    request: Request,
    context: int,
    model: Mapping[str, Any],
    parts: _Parts,
    seconds: float,
) -> Engine:
    """What engine.json says of a finished build in `folder`; source: the bundle at `path`, or its
    requantized form.
    """
    errors = parts.errors
    return Engine(
        manifest.FORMAT,
        request.made_by,
        str(request.target),
        str(path.resolve()),
        bundle.sha256,
        context,
        request.tiles,
        request.precision,
        source.manifest.dtype,
        model,
        tuple(c.record for c in parts.compiled),
        source.manifest.edges,
        parts.files,
        source.manifest.plan,
        tuple(decision for c in parts.compiled for decision in c.lowering),
        Built(seconds, peak_rss_mb(), errors.kernels, errors.losses, request.accept_loss),
        request.tuning.options,
        parts.prompts,
        request.tuning.trials,
        parts.plans,
        parts.verified,
        checksums.of_files(folder, parts.files, threads_here()),
        parts.plugins,
        request.options.strip,
    )


@dataclass(frozen=True)
class _Parts:
    """What an engine is made of, and its errors. verified: whether these were measured."""

    compiled: list[Compiled]
    files: dict[str, FileRecord]
    errors: check.Errors
    prompts: PromptForm | None
    verified: bool = True
    more: tuple[Plugin, ...] = ()  # of the second form

    @property
    def plans(self) -> dict[str, PlanReport]:
        """What TensorRT's builder made of each component."""
        return {c.record.name: c.plan for c in self.compiled if c.plan is not None}

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """Those that its components need, each once."""
        return tuple(dict.fromkeys((*(p for c in self.compiled for p in c.plugins), *self.more)))


def _parts(
    source: Bundle,
    backend: Backend,
    folder: Path,
    request: Request,
    sizes: Callable[[str], Shapes],
    allowed: float,
    elsewhere: bool,
    progress: Progress,
) -> _Parts:
    """Compile all components and compare them with the reference; a second form of one too.

    elsewhere: they cannot run here; the goldens go with them, to be compared where they can.
    """
    ours = request.tuning.native
    compiled, files = _compile(source, backend, folder, request.target, sizes, ours, progress)
    plugins.check_used(request.options.plugins, compiled)
    if elsewhere:
        (folder / GOLDENS).write_bytes((source.path / GOLDENS).read_bytes())
        files[GOLDENS] = record_file(folder / GOLDENS)
        return _Parts(compiled, files, check.Errors({}, {}), None, verified=False)
    compiled, errors = native.checked(
        compiled,
        folder,
        lambda parts: check.check(
            source, parts, backend, folder, allowed, progress, bisect=request.bisect
        ),
        progress,
    )
    files = {name: record for name, record in files.items() if (folder / name).exists()}
    wanted = request.tuning.prompts
    if wanted is None:
        return _Parts(compiled, files, errors, None)
    where, lm = (folder, request.target), source.vlm.lm.name
    second = second_form.add(wanted, source, backend, *where, sizes(lm), allowed, progress, ours)
    errors = errors.joined(second.errors, second_form.IN_PROMPTS)
    return _Parts(compiled, files | second.files, errors, second.form, more=second.plugins)


@contextmanager
def _requantized(requantization: Requantization, folder: Path) -> Iterator[Bundle]:
    """A temporary bundle in the engine's folder, removed once the engine is built."""
    path = folder / "bundle"
    try:
        requantization.write(path)
        yield Bundle.open(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def lowering(bundle: Bundle, request: Request) -> list[Decision]:
    """The lowering table of every component that a build would have. Needs no device."""
    if request.target.backend == "reference":
        return []
    from edgevlm.engines.backends.onnx_files import read_graph
    from edgevlm.engines.lowering.lower import decide

    requantized = request.requantization.graphs() if request.requantization else {}
    decisions: list[Decision] = []
    for record in bundle.manifest.components:
        weights = bundle.path / record.weights
        model = requantized.get(record.name) or read_graph(bundle.path / record.graph, weights)
        with of_bundle(str(bundle.path / record.graph)):
            decisions += decide(record.name, model, request.target, request.options.plugins)
    return decisions


def lint(graphs: Mapping[str, onnx.ModelProto], target: Target) -> list[Decision]:
    """The lowering tables of graphs. Raises UnsupportedError for what `target` lacks."""
    from edgevlm.engines.lowering.lower import decide

    return [line for name, model in graphs.items() for line in decide(name, model, target)]


def settled(bundle: Bundle, request: Request) -> tuple[int, Mapping[str, Any]]:
    """Context and model of the requested engine. Raises ConfigError where they cannot be."""
    return _context(bundle, request.context), _model(bundle, request.tiles)


def _context(bundle: Bundle, requested: int | None) -> int:
    limit = towers.context_of(bundle.model)
    if requested is None:
        return limit
    if not limit:
        raise ConfigError(
            f"--max-context {requested} has no effect: {bundle.path} is a vision tower by itself",
            hint="leave it out",
        )
    if not 1 <= requested <= limit:
        raise ConfigError(
            f"--max-context {requested} does not fit: the bundle's tables have {limit} positions",
            hint=f"choose 1 to {limit}, or export again with a larger --max-context",
        )
    return requested


def _model(bundle: Bundle, tiles: int | None) -> Mapping[str, Any]:
    """The bundle's model, whose images are cut into at most `tiles` tiles."""
    if tiles is None:
        return bundle.manifest.model
    rules = bundle.model.images
    if rules.tiling is None:
        raise ConfigError(
            f"--max-image-tiles {tiles} has no effect: {bundle.model.system} sees one view of "
            "each image",
            hint="leave it out",
        )
    images = replace(rules, tiling=rules.tiling.limited(tiles))
    return towers.to_json(replace(bundle.model, images=images))


def _backend_for(
    target: Target, path: Path, out: Path, options: BuildOptions | None = None
) -> tuple[Backend, bool]:
    """The backend, and whether its engines cannot run on this machine, though it builds them."""
    backend = backends.backend(target, options)
    here = backend.here()
    if backend.check_builds(target) and not target.holds(here.arch):
        return backend, True
    try:
        check_runs_here(target, here, f"edgevlm build {path} {out} --target {here}")
    except TargetMismatch as mismatch:
        words = ["edgevlm", "build", str(path), str(out), "--target", str(target)]
        there = f"run this there: {shlex.join(words)} (here, --explain shows how it is lowered)"
        raise TargetMismatch(
            f"an engine for {target} cannot be built on this machine ({here})",
            hint=there if target.backend == "tensorrt" else mismatch.hint,
        ) from None
    return backend, False


def builds_here(target: Target) -> bool:
    """Whether this machine can build engines for `target`."""
    try:
        _backend_for(target, Path(), Path())
    except (TargetMismatch, MissingExtra, UnsupportedError):
        return False
    return True


def _new_bytes(bundle: Bundle, request: Request) -> int:
    """The most disk space that a build takes: the engine's weights, and little else.

    File systems that share the blocks of copies need less.
    """
    dtype = bundle.manifest.dtype
    upcast = capabilities.of(request.target).computes_in(dtype) != dtype
    # some processors take other codes, and prompts may have a form of their own
    second = 2 * _lm_bytes(bundle, request.tuning.prompts.plan) if request.tuning.prompts else 0
    if request.requantization is None and not upcast:
        files = bundle.manifest.files
        first = sum(files[c.weights].nbytes for c in bundle.manifest.components)
        return first + second + _GRAPHS_BYTES
    plan = request.plan(bundle)
    copies = 2 if "int8_rows" in plan.precisions else 1
    return second + copies * memory.weights_bytes(bundle.model, plan, 4) + _GRAPHS_BYTES


def _lm_bytes(bundle: Bundle, plan: PrecisionPlan) -> int:
    return stored_bytes(bundle.model, plan, 4)[bundle.vlm.lm.name]


def _compile(
    bundle: Bundle,
    backend: Backend,
    folder: Path,
    target: Target,
    sizes: Callable[[str], Shapes],
    ours: Mapping[str, tuple[Plugin, ...]],
    progress: Progress,
) -> tuple[list[Compiled], dict[str, FileRecord]]:
    components, files = [], {}
    for record in bundle.manifest.components:
        progress(f"{record.name}: lowering for {target}")
        dtype, shape = bundle.manifest.dtype, sizes(record.name)
        with of_bundle(str(bundle.path / record.graph)):
            compiled = backend.compile(bundle.path, dtype, record, folder, target, shape)
            compiled = native.added(compiled, folder, ours.get(record.name, ()))
        for note in compiled.notes:
            progress(f"{record.name}: {note}")
        components.append(compiled)
        for name in compiled.files:
            original = bundle.manifest.files.get(name)
            linked = original is not None and (folder / name).samefile(bundle.path / name)
            files[name] = original if original and linked else record_file(folder / name)
    files |= {name: record_file(folder / name) for name in backend.extras(folder)}
    if TOKENIZER in bundle.manifest.files:  # a tower by itself has none
        (folder / TOKENIZER).write_bytes((bundle.path / TOKENIZER).read_bytes())
        files[TOKENIZER] = bundle.manifest.files[TOKENIZER]
    return components, files
