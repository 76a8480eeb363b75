"""TensorRT and TensorRT-RTX: plans built by NVIDIA's builder, one code for both.

RTX builds for cards that are not there: such an engine has not been compared with the reference
until `edgevlm verify` did so on a machine with one.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgevlm.engines.backends import (
    BuildOptions,
    Compiled,
    Peaks,
    Runner,
    RunnerOptions,
    Shapes,
    onnx_files,
)
from edgevlm.engines.backends.tensorrt import device, kernels, plugins, refit
from edgevlm.engines.backends.tensorrt.card import Cards
from edgevlm.engines.backends.tensorrt.flavours import FLAVOURS, Flavour
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.target import Target

if TYPE_CHECKING:
    import onnx

    from edgevlm.engines.backends.tensorrt import builder

RTX_CARDS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120")


def of(target: Target, options: BuildOptions) -> TensorRT:
    """The backend of a target of either product, which builds as `options` say."""
    return TensorRT(FLAVOURS[target.backend], options)


class TensorRT:
    """One of the two products as a backend; what one such object opens shares a card's memory."""

    def __init__(self, flavour: Flavour, options: BuildOptions | None = None) -> None:
        self._flavour, self._options = flavour, options or BuildOptions()
        self._cards = Cards(flavour.extra)

    def here(self) -> Target:
        """The installed release and this machine's card."""
        return self._flavour.here()

    def check_builds(self, target: Target) -> bool:
        """RTX builds for any card of its own kinds; TensorRT for the one at hand."""
        if self._flavour.needs_device:
            if self._options.plugins and target.holds(self.here().arch):
                plugins.check_builds(target)
            return False
        if self._options.strip:
            refit.check_builds(target, self.here())
        self._flavour.check_release(target)
        unknown = [arch for arch in target.arch.split("+") if arch not in RTX_CARDS]
        if unknown:
            raise UnsupportedError(
                f"TensorRT-RTX has no engines for {', '.join(unknown)}",
                hint=f"it knows {', '.join(RTX_CARDS)}; for others: tensorrt@RELEASE/{unknown[0]}",
            )
        return True

    def compile(
        self,
        source: Path,
        dtype: str,
        record: ComponentRecord,
        folder: Path,
        target: Target,
        shapes: Shapes,
    ) -> Compiled:
        """Lower one component, have it built in a process of its own, and read what it became.

        Raises BuildError with the builder's reason, OutOfMemory or UnsupportedError.
        """
        from edgevlm.engines.backends.tensorrt import builder
        from edgevlm.engines.lowering import lower

        start = time.perf_counter()
        model = onnx_files.read_graph(source / record.graph, source / record.weights)
        lowered = lower.lower_component(record.name, model, target, self._options.plugins)
        wanted = plugins.of_graph(model, target)
        built = self._built(source, record, model, folder, target, shapes)
        seconds = time.perf_counter() - start
        report, made = builder.report(record, model, built, seconds)
        rounded = builder.products_in_8_bits(model)
        plan, listing = f"{record.name}.plan", f"{record.name}.kernels.json"
        (folder / listing).write_text(json.dumps([asdict(kernel) for kernel in made], indent=0))
        notes = [
            f"{report.kernels} kernels; of {report.attentions} attentions "
            f"{report.fused_attentions} have kernels of their own",
            *(_rounded(rounded, kernels.products(made, rounded, built.profiles)) if made else ()),
            *(f"{p.op} is computed by the plugin {p.namespace}::{p.name}" for p in wanted),
        ]
        kept = (record.graph, record.weights) if self._options.strip else ()
        formats = set(rounded.values())
        precision = _precision(dtype, [d.op for d in lowered.decisions], formats)
        return Compiled(
            replace(record, graph=plan, weights=record.weights if kept else plan),
            (plan, listing, *kept),
            precision,
            tuple(notes),
            lowered.decisions,
            report,
            plugins=wanted,
        )

    def _built(
        self,
        source: Path,
        record: ComponentRecord,
        model: onnx.ModelProto,
        folder: Path,
        target: Target,
        shapes: Shapes,
    ) -> builder.Built:
        """Have a lowered graph built into a plan in `folder`, in a process of its own."""
        from edgevlm.engines.backends.tensorrt import builder

        # RTX caps nothing for cards that are not here, and ignores what was timed before
        card = device.facts() if self._flavour.needs_device else None
        if not self._flavour.needs_device:
            shapes = builder.sharing(shapes, model)
        fixed = builder.fixed_sizes(shapes)
        builder.fix(model, fixed)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            kept = folder if self._options.strip else None
            graph = builder.prepare(source, record, model, Path(name), kept_in=kept)
            job = builder.Job(
                module=self._flavour.module,
                graph=str(graph),
                plan=str(folder / f"{record.name}.plan"),
                profiles=builder.profiles(record.inputs, shapes, fixed),
                capabilities=_capabilities(target),
                workspace_bytes=card.workspace_bytes if card else 0,
                timing_cache=builder.timing_cache(self.here(), card) if card else "",
                plugins=plugins.to_register(plugins.of_graph(model, target), target),
                strip=self._options.strip,
            )
            result = builder.build(record.name, job, Path(name))
            log = (Path(name) / "build.log").read_text()
            return builder.Built(result, log, len(job.profiles), builder.most_rows(shapes))

    def marked(
        self,
        source: Path,
        record: ComponentRecord,
        model: onnx.ModelProto,
        folder: Path,
        target: Target,
        shapes: Shapes,
    ) -> ComponentRecord:
        """Build a lowered graph as it is, with the outputs that it has; the record to open it with.

        Raises as compile does.
        """
        self._built(source, record, model, folder, target, shapes)
        plan = f"{record.name}.plan"
        return replace(record, graph=plan, weights=record.weights if self._options.strip else plan)

    def without_logits(self, folder: Path, record: ComponentRecord) -> ComponentRecord:
        """Not needed: one plan serves prompts and tokens, by two profiles."""
        raise UnsupportedError("TensorRT engines have one form of the language model")

    def extras(self, folder: Path) -> tuple[str, ...]:
        """No files."""
        return ()

    def open(
        self,
        folder: Path,
        record: ComponentRecord,
        model: Mapping[str, object],
        options: RunnerOptions,
    ) -> Runner:
        """Load one component onto the card.

        Raises MissingExtra, TargetMismatch, OutOfMemory, or BuildError with TensorRT's reason.
        """
        from edgevlm.engines.backends.tensorrt.runner import open_runner

        trt = self._flavour.load()
        plugins.load(trt, self.here(), options.plugins)
        return open_runner(self._cards, trt, folder, record, options, self.here())

    def peaks(self, folder: Path) -> Peaks:
        """This machine's card, by plans that are built for it now; see probes.py."""
        from edgevlm.engines.backends.tensorrt import probes

        here = self.here()
        trt = self._flavour.load()
        module, capabilities = self._flavour.module, _capabilities(here)
        return probes.peaks(self._cards, trt, module, capabilities, here.arch)


def _rounded(sites: Mapping[str, str], found: Sequence[str]) -> list[str]:
    """What became of products of inputs in 8 bits; found: those that kernels of that format
    compute.
    """
    if not sites:
        return []
    formats = " and ".join(sorted({kind.upper() for kind in sites.values()}))
    lost = [site for site in sites if site not in found]
    if not lost:
        return [f"all {len(sites)} products of inputs in {formats} are computed in it"]
    return [
        f"the builder made floats of {len(lost)} of {len(sites)} products of inputs in {formats} "
        f"({lost[0]}): rounding costs there and gains nothing, --keep-float leaves them in float"
    ]


def _precision(dtype: str, ops: list[str], formats: set[str]) -> str:
    """What a component computes in, which sets its tolerance: the reference rounds the inputs of
    weights by channel, which stay in float here; those of static INT8 may round the other way.

    formats: of products, see builder.products_in_8_bits.
    """
    if "FP8" in formats:
        return "fp8"
    if "QuantizeLinear" in ops:
        return "int8"
    return "int8_rows" if "edgevlm.RowQuantizedLinear" in ops else dtype


def _capabilities(target: Target) -> list[str]:
    """RTX's names of the cards of a target; none for TensorRT, which builds for the one here."""
    if target.backend != "tensorrt-rtx":
        return []
    return [arch.replace("_", "").upper() for arch in target.arch.split("+")]
