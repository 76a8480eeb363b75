"""Engines of ONNX Runtime on a card: are tokens those of the processor, how near are the limits.

`python -m benchmarks.gpu_decode --save` exports a preset with random weights in fp16, builds it for
this machine's card as it is and in 4 bits, and for its processor. Along the processor's tokens it
counts how often the card would have chosen the same, and how far its logits are. Speed is a share
of what the card does in torch: single tokens of its memory rate, images of its fp16 matrix rate.
Needs an NVIDIA card, onnxruntime-gpu with CUDA's libraries, and torch for CUDA (without torch, ONNX
Runtime's own products measure the card). What fails is noted, and the rest goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Bar, Report, edgevlm, parser, workplace

PRESET = "llava-qwen2-0.5b"
CONTEXT = "1024"
TOKENS = 64
PROMPT = 64  # tokens of text that are compared
RUNS = 3
SAME, DECODE, ENCODER = 0.95, 0.6, 0.5  # bars
_FORMS = {"fp16": (), "int4": ("--precision", "int4", "--accept-loss", "2")}


@dataclass(frozen=True)
class Limits:
    """What a card does: reading and writing its memory; products of large matrices."""

    gb_s: float
    fp16_tflop_s: float
    bf16_tflop_s: float
    by: str


def limits_by_torch(device: str = "cuda", megabytes: int = 1024, width: int = 8192) -> Limits:
    """Copies of so much memory, and products of square matrices. Raises what torch raises."""
    import torch

    rate = _copied_gb_s(device, megabytes)
    fp16, bf16 = (_product_tflop_s(device, width, t) for t in (torch.float16, torch.bfloat16))
    if device == "cuda":
        torch.cuda.empty_cache()  # the engines need it
    return Limits(rate, fp16, bf16, f"torch {torch.__version__}")


def _copied_gb_s(device: str, megabytes: int) -> float:
    """Bytes read and written, of a copy."""
    import torch

    source = torch.ones(megabytes * 1024**2 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e9 / _seconds(device, lambda: target.copy_(source))


def _product_tflop_s(device: str, width: int, dtype: Any) -> float:
    import torch

    matrix = torch.ones((width, width), device=device, dtype=dtype)
    return 2 * width**3 / 1e12 / _seconds(device, lambda: matrix @ matrix)


def _seconds(device: str, work: Callable[[], object]) -> float:
    """The shortest of several runs."""
    import torch

    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def limits_by_onnxruntime(engine: Path) -> Limits:
    """The same by the probes of an engine."""
    from edgevlm.engines import backends, manifest

    target = manifest.read(engine).parsed_target()
    peaks = backends.backend(target).peaks(engine)
    rate = peaks.gflop_s / 1000
    return Limits(peaks.gb_s, rate, rate, "ONNX Runtime")


def agreement(card: Path, processor: Path, steps: int) -> dict[str, float]:
    """Along the processor's greedy tokens after a prompt of ids: the share that the card would have
    chosen too, and the relative rms difference of the logits less their means.
    """
    import numpy as np

    from edgevlm.engines.runtime.session import Session
    from edgevlm.toolkit.text.prompts import PromptSequence

    with Session.open(card) as ours, Session.open(processor) as theirs:
        vocabulary, width = ours.model.lm.config.vocab_size, ours.model.lm.config.hidden_size
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, PROMPT))
        sequence = PromptSequence(ids, np.full_like(ids, -1))
        none = np.zeros((1, width), np.float32)
        states = [session.new_state() for session in (ours, theirs)]
        logits = [
            session.prefill(sequence, none, state)
            for session, state in zip((ours, theirs), states, strict=True)
        ]
        same, errors = 0, []
        for step in range(steps):
            mine, reference = (np.asarray(x, np.float64) - x.mean() for x in logits)
            token = int(reference.argmax())
            same += int(mine.argmax()) == token
            errors.append(float(np.sqrt(((mine - reference) ** 2).mean() / reference.var())))
            logits = [
                session.decode(token, PROMPT + step, state)
                for session, state in zip((ours, theirs), states, strict=True)
            ]
    return {"same_tokens": same / steps, "logits_rms": max(errors)}


def speed(engine: Path, limits: Limits, runs: int, tokens: int) -> dict[str, Any]:
    """Times of a question with an image, and what share of the limits each stage reached."""
    from edgevlm.engines import manifest
    from edgevlm.engines.profiling.profile import ProfileRequest, profile

    described = manifest.read(engine)
    found = profile(engine, ProfileRequest(runs=runs, max_tokens=tokens), _silent)
    medians = {stage: times.p50_ms for stage, times in found.stages.items()}
    shares = {
        bound.stage: share(bound.gflops, bound.gbytes, medians[bound.stage], limits)
        for bound in found.roofline.stages
        if bound.stage in medians
    }
    return {
        "ms": {stage: round(ms, 4) for stage, ms in medians.items()},
        "tokens_per_s": found.output_token_throughput_per_user,
        "first_token_ms": found.time_to_first_token_ms,
        "prefill_tokens_per_s": found.prefill_tokens_per_s,
        "reached": {stage: round(reached, 4) for stage, (reached, _) in shares.items()},
        "limited_by": {stage: limit for stage, (_, limit) in shares.items()},
        "kernel_differences": dict(described.build.kernel_differences),
        "precision_losses": dict(described.build.precision_losses),
    }


def share(gflops: float, gbytes: float, ms: float, limits: Limits) -> tuple[float, str]:
    """The share of the limits that so much work in so many ms reached, and the limit that counts.

    gflops, gbytes: 10^9 operations and bytes.
    """
    floors = {"arithmetic": gflops / limits.fp16_tflop_s, "memory": 1000 * gbytes / limits.gb_s}
    limit = max(floors, key=lambda name: floors[name])
    return floors[limit] / ms, limit


def _silent(message: str) -> None:
    return None


def build_all(preset: str, work: Path, target: str = "cuda") -> dict[str, Path]:
    """The engines by name; what is there from an earlier run is kept."""
    bundle = work / "bundle"
    if not bundle.exists():
        options = ("--random-weights", "--dtype", "fp16", "--max-context", CONTEXT)
        edgevlm("export", f"preset:{preset}", bundle, *options)
    engines = {name: work / name for name in (*_FORMS, "processor")}
    for name, engine in engines.items():
        where = "cpu" if name == "processor" else target
        edgevlm("build", bundle, engine, "--target", where, *_FORMS.get(name, ()))
    return engines


class Attempts:
    """Runs the parts of the benchmark; what fails becomes a note."""

    def __init__(self, result: Report) -> None:
        self._result = result

    def __call__(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` returns, None if it fails."""
        try:
            return work()
        except (Exception, SystemExit) as failure:  # a child that fails ends the program
            text = " ".join(str(failure).split())[-400:]
            self._result.notes.append(f"{what} failed: {type(failure).__name__}: {text}")
            return None


def card_facts() -> dict[str, Any]:
    """The card and its driver."""
    from edgevlm.toolkit.target import card

    return {
        "name": card.name(),
        "architecture": card.architecture(),
        "cuda_of_the_driver": card.driver_version(),
        "free_bytes": card.free_bytes(),
    }


def measure(preset: str, work: Path, result: Report, limits: Limits | None = None) -> None:
    """Everything, into `result`."""
    attempt = Attempts(result)
    result.measured |= {"card": card_facts(), "preset": preset}
    engines = attempt("building", lambda: build_all(preset, work))
    limits = limits or attempt("measuring the card with torch", limits_by_torch)
    if engines is None:
        return
    if limits is None:
        limits = attempt("measuring the card", lambda: limits_by_onnxruntime(engines["fp16"]))
    same = attempt(
        "comparing tokens", lambda: agreement(engines["fp16"], engines["processor"], TOKENS)
    )
    if same is not None:
        result.measured["fp16 against the processor"] = same
        result.bars.append(
            Bar("tokens as on the processor", same["same_tokens"], SAME, at_least=True)
        )
    if limits is None:
        return
    result.measured["limits"] = vars(limits)
    for name in _FORMS:
        timed = partial(_speed_of, engines, name, limits)
        found = attempt(f"timing {name}", timed)
        if found is not None:
            _report(name, found, result)


def _speed_of(engines: Mapping[str, Path], name: str, limits: Limits) -> dict[str, Any]:
    return speed(engines[name], limits, RUNS, TOKENS)


def _report(name: str, found: dict[str, Any], result: Report) -> None:
    result.measured[name] = found
    reached = found["reached"]
    encoders = [share for stage, share in reached.items() if stage.startswith("encoder")]
    encoder = min(encoders, default=0.0)
    result.rows.append(
        (
            name,
            round(found["first_token_ms"], 2),
            round(found["tokens_per_s"], 1),
            f"{100 * reached.get('decode', 0.0):.0f} %",
            f"{100 * encoder:.0f} %",
        )
    )
    if name == "fp16":
        result.bars += [
            Bar("decode, of the memory rate", reached.get("decode", 0.0), DECODE, at_least=True),
            Bar("encoder, of the matrix rate", encoder, ENCODER, at_least=True),
        ]


def report() -> Report:
    """An empty result."""
    packages = ("edgevlm", "onnxruntime-gpu", "torch", "numpy", "nvidia-cudnn-cu13")
    columns = ("engine", "first token ms", "tokens/s", "decode", "encoder")
    return Report("gpu_decode", columns, packages)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold or something failed."""
    command_line = parser(__doc__)
    command_line.add_argument("--preset", default=PRESET, help="a preset's name")
    options = command_line.parse_args(arguments)
    result = report()
    with workplace(options) as work:
        measure(options.preset, work, result)
    holds = result.finish(options)
    return 0 if holds and result.bars and not result.notes else 1


if __name__ == "__main__":
    sys.exit(main())
