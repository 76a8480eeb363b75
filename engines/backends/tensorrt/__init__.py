"""TensorRT and TensorRT-RTX: plans built by NVIDIA's builder, one code for both.

RTX builds for cards that are not there: such an engine has not been compared with the reference
until `edgevlm verify` did so on a machine with one.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from edgevlm.engines.backends import Compiled, Peaks, Runner, RunnerOptions, Shapes
from edgevlm.engines.backends.tensorrt import device
from edgevlm.engines.backends.tensorrt.card import Cards
from edgevlm.engines.backends.tensorrt.flavours import FLAVOURS, Flavour
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.errors import MissingExtra, UnsupportedError
from edgevlm.toolkit.target import Target

RTX_CARDS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120")


def of(target: Target) -> TensorRT:
    """The backend of a target of either product."""
    return TensorRT(FLAVOURS[target.backend])


class TensorRT:
    """One of the two products as a backend; what one such object opens shares a card's memory."""

    def __init__(self, flavour: Flavour) -> None:
        self._flavour = flavour
        self._cards = Cards(flavour.extra)

    def here(self) -> Target:
        """The installed release and this machine's card."""
        return self._flavour.here()

    def check_builds(self, target: Target) -> bool:
        """RTX builds for any card of its own kinds; TensorRT for the one at hand."""
        if self._flavour.needs_device:
            return False
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
        try:
            import onnx
        except ImportError:
            raise MissingExtra("onnx", "export", purpose="building an engine") from None
        from edgevlm.engines.backends.tensorrt import builder
        from edgevlm.engines.lowering import lower

        start = time.perf_counter()
        # RTX caps nothing for cards that are not here, and ignores what was timed before
        card = device.facts() if self._flavour.needs_device else None
        model = onnx.load(str(source / record.graph), load_external_data=False)
        lowered = lower.lower_component(record.name, model, target)
        fixed = builder.fixed_sizes(shapes)
        builder.fix(model, fixed)
        profiles = builder.profiles(record.inputs, shapes, fixed)
        plan, listing = folder / f"{record.name}.plan", folder / f"{record.name}.kernels.json"
        with tempfile.TemporaryDirectory(dir=folder) as name:
            scratch = Path(name)
            graph = builder.prepare(source, record, model, scratch)
            job = builder.Job(
                module=self._flavour.module,
                graph=str(graph),
                plan=str(plan),
                profiles=profiles,
                capabilities=_capabilities(target),
                workspace_bytes=card.workspace_bytes if card else 0,
                timing_cache=builder.timing_cache(self.here(), card) if card else "",
            )
            result = builder.build(record.name, job, scratch)
            log = (scratch / "build.log").read_text()
        seconds = time.perf_counter() - start
        report, kernels = builder.report(record, model, result, log, len(profiles), seconds)
        listing.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=0))
        notes = [
            f"{report.kernels} kernels; of {report.attentions} attentions "
            f"{report.fused_attentions} have kernels of their own"
        ]
        made = replace(record, graph=plan.name, weights=plan.name)
        files = plan.name, listing.name
        return Compiled(made, files, dtype, tuple(notes), lowered.decisions, report)

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
        return open_runner(self._cards, trt, folder, record, options, self.here())

    def peaks(self, folder: Path) -> Peaks:
        """This machine's card, by plans that are built for it now; see probes.py."""
        from edgevlm.engines.backends.tensorrt import probes

        here = self.here()
        trt = self._flavour.load()
        return probes.peaks(self._cards, trt, self._flavour.module, _capabilities(here))


def _capabilities(target: Target) -> list[str]:
    """RTX's names of the cards of a target; none for TensorRT, which builds for the one here."""
    if target.backend != "tensorrt-rtx":
        return []
    return [arch.replace("_", "").upper() for arch in target.arch.split("+")]
