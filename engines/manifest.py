"""The engine: a folder built from one bundle for one target, and engine.json that describes it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgevlm.engines import backends
from edgevlm.engines.backends import BuildOptions, PlanReport, Plugin
from edgevlm.engines.lowering.capabilities import Decision
from edgevlm.toolkit.bundle.manifest import ComponentRecord, FileRecord, check_parts
from edgevlm.toolkit.errors import AccuracyError, BundleError, ConfigError
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.toolkit.strict import from_plain, read_json, to_plain
from edgevlm.toolkit.target import Target, check_runs_here, parse
from edgevlm.toolkit.vlm import config as model_config
from edgevlm.toolkit.vlm.components import Edge
from edgevlm.toolkit.vlm.config import ModelConfig

FORMAT = 3
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
    its linears together. chosen: whether the engine runs such calls in this format.
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

    context: positions of the KV cache. max_image_tiles: None for all. precision: the requested
    one, None for the bundle's own; tuning_options: --no-tune and --keep-slower as given.
    plan: the precision plan of the engine. prompt_form: where prompts run in another precision than
    single tokens. trials: what was timed to choose. plans: of TensorRT, by component. verified:
    whether the engine was compared with the reference; one for a card that the machine that built
    it lacks was not, until `edgevlm verify` runs on a machine that has it. plugins: of TensorRT,
    that compute calls of it. stripped: whether its plans get their weights when they are opened.
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
    plugins: tuple[Plugin, ...] = ()
    stripped: bool = False

    @property
    def options(self) -> BuildOptions:
        """What TensorRT's build was asked for."""
        return BuildOptions(tuple(sorted({p.op for p in self.plugins})), self.stripped)

    def parsed_target(self) -> Target:
        """The target as a value."""
        return parse(self.target)

    def parsed_model(self) -> ModelConfig:
        """The model's configuration as values."""
        return model_config.from_json(dict(self.model), f"{DESCRIPTION}: model")

    def rebuild_command(self, folder: Path, target: str = "cpu") -> str:
        """The command that builds this engine again, for `target`."""
        words = ["edgevlm", "build", self.bundle, str(folder), "--target", target]
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
    text = json.dumps(to_plain(engine), indent=1)  # ASCII: a path need not be UTF-8
    new = folder / f"{DESCRIPTION}.new"
    try:
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(folder / DESCRIPTION)
    finally:
        new.unlink(missing_ok=True)


def read(folder: Path) -> Engine:
    """Read engine.json. Raises BundleError if the folder is not an engine of ours."""
    path = folder / DESCRIPTION
    if not path.exists():
        raise BundleError(f"{folder} is not an engine: it has no {DESCRIPTION}", hint=_next(folder))
    try:
        data = read_json(path)
        if data.get("format") != FORMAT:
            raise ConfigError(f"{path} has format {data.get('format')!r}, expected {FORMAT}")
        engine = from_plain(Engine, data, str(path))
        check_parts(str(path), engine.parsed_model(), engine.components, engine.edges, engine.files)
        if engine.context < 1:
            raise ConfigError(f"{path}: context = {engine.context}, expected at least 1")
        return engine
    except ConfigError as odd:
        raise BundleError(odd.message, hint="build the engine again") from None


def _next(folder: Path) -> str:
    if (folder / "manifest.json").exists():
        return f"this is a bundle; build it first: edgevlm build {folder} ENGINE"
    return f"build one: edgevlm build BUNDLE {folder}"


def check(folder: Path, engine: Engine) -> None:
    """Raise TargetMismatch on another machine, BundleError if a file is missing or changed."""
    target = engine.parsed_target()
    here = backends.backend(target).here()
    check_runs_here(target, here, engine.rebuild_command(folder))
    check_files(folder, engine)


def check_files(folder: Path, engine: Engine) -> None:
    """Raise BundleError if a file is missing or of another size."""
    for name, record in engine.files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != record.nbytes:
            actual = f"{path.stat().st_size} bytes" if path.exists() else "missing"
            raise BundleError(
                f"{path}: {actual}, the build wrote {record.nbytes} bytes",
                hint=f"build it again: {engine.rebuild_command(folder, engine.target)}",
            )


def check_verified(folder: Path, engine: Engine) -> None:
    """Raise AccuracyError for an engine that was never compared with the reference."""
    if not engine.verified:
        raise AccuracyError(
            f"{folder} was built on a machine without its graphics card, and never compared with "
            "the reference",
            hint=f"compare it here, once: {shlex.join(['edgevlm', 'verify', str(folder)])}",
        )
