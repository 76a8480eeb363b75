"""The engine: a folder built from one bundle for one target, and engine.json that describes it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from edgevlm.engines import backends
from edgevlm.engines.backends import BuildOptions, PlanReport, Plugin, native
from edgevlm.engines.lowering.capabilities import Decision
from edgevlm.toolkit.bundle import checksums, mistaken, sealed
from edgevlm.toolkit.bundle.atomic import sha256_of
from edgevlm.toolkit.bundle.checksums import Checksums
from edgevlm.toolkit.bundle.manifest import (
    ComponentRecord,
    FileRecord,
    check_graphs,
    check_parts,
    size_fault,
)
from edgevlm.toolkit.errors import AccuracyError, BundleError, ConfigError
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.toolkit.strict import from_plain, read_json
from edgevlm.toolkit.target import Target, check_runs_here, parse, threads_here
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.components import Edge
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.towers import Model

FORMAT = 4
DESCRIPTION = "engine.json"
PREFILL_CHUNK = 256  # tokens of a prompt that the language model reads at a time


@dataclass(frozen=True)
class Built:
    """What the build cost, and how exact the engine is.

    Relative root mean square errors by component: kernel_differences to the reference on the same
    weights; precision_losses to the float model, empty where no weight is rounded. accepted_loss:
    the limit that the user set with --accept-loss, None for the precision's own.
    """

    seconds: float
    peak_rss_mb: float
    kernel_differences: Mapping[str, float]
    precision_losses: Mapping[str, float]
    accepted_loss: float | None


@dataclass(frozen=True)
class Trial:
    """A component in one number format: what the linears of a call take on this machine.

    call: "view" of an image, "prompt" of the usual length, or "token". ms: milliseconds of all
    its linears together; of the "attention" of a view, that of all of them, in ONNX Runtime's
    kernel ("float") and in ours. chosen: whether the engine runs such calls in this format.
    """

    component: str
    call: str
    precision: Precision
    ms: float
    chosen: bool


@dataclass(frozen=True)
class PromptForm:
    """The language model once more, in the precision that reads prompts fastest; no logits."""

    record: ComponentRecord
    plan: PrecisionPlan


@dataclass(frozen=True)
class Engine:
    """What engine.json holds.

    context: positions of the KV cache, 0 for a vision tower by itself. max_image_tiles: None for
    all. precision: the requested one, None for the bundle's own; tuning_options: --no-tune,
    --keep-slower, --keep-float as given.
    plan: the precision plan of the engine. prompt_form: where prompts run in another precision than
    single tokens. trials: what was timed to choose. plans: of TensorRT, by component. verified:
    whether the engine was compared with the reference; one for a card that the machine that built
    it lacks was not, until `edgevlm verify` runs on a machine that has it. checksums: of the files,
    compared whenever the engine is opened. plugins: kernels of ours that compute calls of it.
    stripped: whether its plans get their weights when they are opened.
    """

    format: int
    made_by: str
    target: str
    bundle: str
    bundle_sha256: str
    context: int
    max_image_tiles: int | None
    precision: str | None
    dtype: str
    model: Mapping[str, Any]
    components: tuple[ComponentRecord, ...]
    edges: tuple[Edge, ...]
    files: Mapping[str, FileRecord]
    plan: PrecisionPlan
    lowering: tuple[Decision, ...]
    build: Built
    tuning_options: tuple[str, ...] = ()
    prompt_form: PromptForm | None = None
    trials: tuple[Trial, ...] = ()
    plans: Mapping[str, PlanReport] = field(default_factory=dict)
    verified: bool = True
    checksums: Checksums = field(default_factory=dict)
    plugins: tuple[Plugin, ...] = ()
    stripped: bool = False

    @property
    def options(self) -> BuildOptions:
        """What TensorRT's build was asked for."""
        asked = {p.op for p in self.plugins if not native.is_ours(p)}
        return BuildOptions(tuple(sorted(asked)), self.stripped)

    def parsed_target(self) -> Target:
        """The target as a value."""
        return parse(self.target)

    def parsed_model(self) -> Model:
        """The model's configuration as values."""
        return towers.from_json(dict(self.model), f"{DESCRIPTION}: model")

    def parsed_vlm(self) -> ModelConfig:
        """The same of a vision-language model. Raises UnsupportedError for a tower by itself."""
        return towers.vlm(self.parsed_model(), "the engine")

    def rebuild_command(self, folder: Path, target: str = "cpu") -> str:
        """The command that builds this engine again, for `target`."""
        words = ["edgevlm", "build", self.bundle, str(folder), "--target", target]
        if self.context:
            words += ["--max-context", str(self.context)]
        if self.max_image_tiles is not None:
            words += ["--max-image-tiles", str(self.max_image_tiles)]
        if self.precision is not None:
            words += ["--precision", self.precision]
        words += self.tuning_options
        if self.options.plugins:
            words += ["--plugins", ",".join(self.options.plugins)]
        words += ["--strip-weights"] * self.stripped
        if self.build.accepted_loss is not None:
            words += ["--accept-loss", f"{self.build.accepted_loss:g}"]
        return shlex.join([*words, "--force"])


def write(folder: Path, engine: Engine) -> None:
    """Write engine.json, whole or not at all: `verify` writes it into a finished engine."""
    new = folder / f"{DESCRIPTION}.new"
    try:
        sealed.write(new, engine)
        new.replace(folder / DESCRIPTION)
    finally:
        new.unlink(missing_ok=True)


def read(folder: Path) -> Engine:
    """Read engine.json. Raises BundleError if the folder is not an engine of ours."""
    path = folder / DESCRIPTION
    if not path.exists():
        raise mistaken.no_engine(folder)
    try:
        data = read_json(path, ours=True)
        if data.get("format") != FORMAT:
            raise ConfigError(f"{path} has format {data.get('format')!r:.80}, expected {FORMAT}")
        stated = {key: value for key, value in data.items() if key != sealed.SEAL}
        engine = from_plain(Engine, stated, str(path))
        _check(engine, str(path))
        sealed.opened(data, str(path))
        return engine
    except ConfigError as odd:
        raise BundleError(odd.message, hint="build the engine again") from None


def _check(engine: Engine, where: str) -> None:
    """Raise ConfigError for parts that do not go together, or lead out of the folder."""
    model = engine.parsed_model()
    check_parts(where, model, engine.components, engine.edges, engine.files)
    longest = towers.context_of(model)
    least = min(longest, 1)
    if not least <= engine.context <= longest:
        raise ConfigError(f"{where}: context = {engine.context}, expected {least} to {longest}")
    records = [*engine.components]
    if engine.prompt_form is not None:
        records.append(_prompt_record(engine, engine.prompt_form.record, where))
    if engine.parsed_target().backend != "reference":  # which has no graphs
        check_graphs(where, records, engine.files)
    if engine.checksums.keys() != engine.files.keys():
        raise ConfigError(f"{where}: checksums are not those of the files")


def _prompt_record(engine: Engine, record: ComponentRecord, where: str) -> ComponentRecord:
    """The record of the second language model: of the first one's ports, without the scores."""
    first = next(c for c in engine.components if c.name == engine.parsed_vlm().lm.name)
    known = {*first.inputs, *first.outputs}
    fits = record.name == first.name and {*record.inputs, *record.outputs} <= known
    if not fits or record.weights not in engine.files or record.graph == first.graph:
        raise ConfigError(f"{where}: prompt_form is no second form of {first.name}")
    return record


def check(folder: Path, engine: Engine) -> None:
    """Raise TargetMismatch on another machine, BundleError if a file is missing or damaged."""
    target = engine.parsed_target()
    here = backends.backend(target).here()
    check_runs_here(target, here, engine.rebuild_command(folder))
    check_files(folder, engine)


def check_files(folder: Path, engine: Engine, *, verify: bool = False) -> None:
    """Raise BundleError if a file is missing or is not what the build wrote; reads all of them.

    verify: by SHA-256, which tells changes that somebody made on purpose too.
    """
    fault = next(iter(faults(folder, engine, verify=verify)), None)
    if fault:
        raise BundleError(fault, hint=_again(folder, engine))


def faults(folder: Path, engine: Engine, *, verify: bool = False) -> list[str]:
    """What is wrong with an engine's files, as text; [] for one as it was built."""
    found = {
        name: size_fault(folder, name, record, "the build") for name, record in engine.files.items()
    }
    whole = [name for name, fault in found.items() if fault is None]
    actual = checksums.of_files(folder, whole, threads_here())
    for name in whole:
        pieces = zip_longest(actual[name], engine.checksums[name])
        wrong = [number for number, (here, built) in enumerate(pieces) if here != built]
        if wrong:
            found[name] = _damaged(folder / name, wrong, len(actual[name]))
        elif verify and sha256_of(folder / name) != engine.files[name].sha256:
            found[name] = f"{folder / name} was changed since it was built (SHA-256 differs)"
    return [fault for fault in found.values() if fault]


def examine(folder: Path, engine: Engine) -> None:
    """Raise BundleError naming every file of an engine that is not what the build wrote."""
    found = faults(folder, engine, verify=True)
    if found:
        raise BundleError("; ".join(found), hint=_again(folder, engine))


def _damaged(path: Path, wrong: list[int], pieces: int) -> str:
    text = f"{path} is damaged: it is not what was built (CRC-32 differs"
    if pieces == 1:
        return f"{text})"
    first = wrong[0] * checksums.PIECE_BYTES
    return f"{text} in {len(wrong)} of {pieces} pieces, the first from byte {first} on)"


def _again(folder: Path, engine: Engine) -> str:
    return f"build it again: {engine.rebuild_command(folder, engine.target)}"


def check_verified(folder: Path, engine: Engine) -> None:
    """Raise AccuracyError for an engine that was never compared with the reference."""
    if not engine.verified:
        raise AccuracyError(
            f"{folder} was built on a machine without its graphics card, and never compared with "
            "the reference",
            hint=f"compare it here, once: {shlex.join(['edgevlm', 'verify', str(folder)])}",
        )
