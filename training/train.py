"""A training run from its options to a checkpoint that `export` reads.

OUT/training.json     what the run is; with it a killed run is resumed
OUT/metrics.jsonl     loss, rate, tokens/s: a line for each logged step and evaluation
OUT/states/           the last two states
OUT/checkpoint.json, model*.safetensors, tokenizer.json      written at the end
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.checkpoints.layouts.source import Source
from edgevlm.toolkit.errors import ConfigError, OutputError
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.strict import read_json
from edgevlm.toolkit.vlm.components import components
from edgevlm.toolkit.vlm.config import to_json
from edgevlm.training import lora, optimizer, setup, stages, states
from edgevlm.training.averages import Average
from edgevlm.training.loop import EvalRecord, Progress, Schedules, Trainer
from edgevlm.training.options import TrainOptions
from edgevlm.training.report import Report, Silent, cut_back, losses
from edgevlm.training.setup import Feeds, Say
from edgevlm.training.stages import Stage
from edgevlm.training.vlm import VLM, parameter_count

FACTS = "training.json"
LORA_RATE = 2e-4  # of the published scripts


@dataclass(frozen=True)
class Request:
    """A run. model: what the user called it; plan: of --qat; say: prints a line of progress."""

    stage: str
    model: str
    source: Source
    out: Path
    options: TrainOptions
    resume: bool
    made_by: str
    say: Say
    plan: PrecisionPlan | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Result:
    """What a run came to. first_loss, last_loss: of the first and last logged step.

    faults: samples that were skipped or cut short, by kind. seconds: of this call. processes: how
    many took part, and how (accelerate's name of it). process: which of them tells this.
    """

    stage: str
    out: str
    steps: int
    samples: int
    targets: int
    parameters: int
    trained_parameters: int
    first_loss: float | None
    last_loss: float | None
    eval_loss: float | None
    eval_token_accuracy: float | None
    faults: Mapping[str, int]
    seconds: float
    peak_rss_mb: float
    processes: int
    distribution: str
    process: int


@dataclass
class _Run:
    """A run that is set up. model: as accelerate wrapped it; bare: without that."""

    request: Request
    stage: Stage
    source: Source
    accelerator: Any
    progress: Progress
    feeds: Feeds
    bare: VLM
    model: Any
    optimizer: Any
    average: Average | None
    facts: dict[str, Any]
    say: Say


def train(request: Request) -> Result:
    """Run a stage. Raises ToolkitError; a killed run leaves OUT with its last state to resume."""
    started = time.perf_counter()
    run = _set_up(request)
    steps = run.facts["steps"]
    final = _fit(run, steps)
    for line in run.feeds.faults.report().lines():
        run.say(f"note: {line}")
    run.say(f"writing {request.out}")
    _write(run)
    logged = losses(request.out) if run.accelerator.is_main_process else []
    everything, trained_count = parameter_count(run.bare)
    return Result(
        run.stage.name,
        str(request.out),
        run.progress.step,
        run.progress.samples,
        run.progress.targets,
        everything,
        trained_count,
        logged[0] if logged else None,
        logged[-1] if logged else None,
        final.loss if final else None,
        final.token_accuracy if final else None,
        run.feeds.faults.report().counts,
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        run.accelerator.num_processes,
        run.accelerator.distributed_type.value,
        run.accelerator.process_index,
    )


def _set_up(request: Request) -> _Run:
    options = request.options
    stage = optimizer.applied(stages.find(request.stage), options)
    if options.lora and options.rate is None:
        stage = replace(stage, rate=LORA_RATE)
    stages.check_system(stage, request.source.model.system)
    check_out(request.out, resume=request.resume)
    accelerator = setup.accelerator(options.precision)
    say = request.say if accelerator.is_main_process else _nothing
    setup.seed_everything(options.seed)
    source = setup.grown_for(stage, request.source, options.seed)
    progress = Progress()
    feeds = setup.feeds(source, stage, options, progress, accelerator, say)
    steps = options.steps or max(round(stage.epochs * feeds.training.steps_per_epoch), 1)
    facts = _facts(request, stage, source, feeds, steps)
    bare = setup.model(source, stage, options, request.plan)
    everything, trained_count = parameter_count(bare)
    say(f"{trained_count:,} of {everything:,} parameters are trained, in {steps} steps")
    names = {name for name, p in bare.named_parameters() if p.requires_grad}
    model, opt = accelerator.prepare(bare, optimizer.adamw(bare, stage))
    setup.save_only(accelerator, names)
    accelerator.register_for_checkpointing(progress)
    average = _average(accelerator, bare, options.ema)
    run = _Run(
        request, stage, source, accelerator, progress, feeds, bare, model, opt, average, facts, say
    )
    _begin(run)
    return run


def check_out(out: Path, *, resume: bool) -> None:
    """Raise OutputError where a run would overwrite something, or has nothing to go on with."""
    if resume:
        if not (out / FACTS).exists():
            raise OutputError(
                f"{out} holds no run to resume", hint="leave --resume out to begin one"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = "--resume goes on with the run" if (out / FACTS).exists() else "choose another"
        raise OutputError(f"{out} exists", hint=hint)


def _begin(run: _Run) -> None:
    """Make OUT, or load the newest state in it."""
    request, first = run.request, run.accelerator.is_main_process
    if request.resume:
        states.check_same(read_json(request.out / FACTS), run.facts, request.out / FACTS)
        states.resume(run.accelerator, request.out, run.progress, run.facts)
        run.say(f"going on after step {run.progress.step}")
        if first:
            cut_back(request.out, run.progress.step)
    elif first:
        request.out.mkdir(parents=True, exist_ok=True)
        description = run.facts | {"options": asdict(request.options), "made_by": request.made_by}
        (request.out / FACTS).write_text(json.dumps(description, indent=1), "utf-8")
    run.accelerator.wait_for_everyone()


def _facts(
    request: Request, stage: Stage, source: Source, feeds: Feeds, steps: int
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    plain = json.dumps(to_json(source.model), sort_keys=True)
    options = request.options
    return {
        "stage": stage.name,
        "model": request.model,
        "model_sha256": hashlib.sha256(plain.encode()).hexdigest(),
        "data": list(options.data),
        "samples": feeds.training.data.size,
        "batch": stage.batch,
        "steps": steps,
        "rate": stage.rate,
        "schedule": options.schedule,
        "seed": options.seed,
        "lora": options.lora,
        "qat": options.qat,
        "trained": [f"{p.names}{'' if not p.frozen else ' frozen'}" for p in stage.trained],
    }


def _average(accelerator: Any, model: VLM, decay: float) -> Average | None:
    if not decay:
        return None
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ConfigError(
            f"--ema is not implemented for {accelerator.distributed_type.value}",
            hint="leave --ema out where weights are sharded",
        )
    average = Average(model, decay)
    accelerator.register_for_checkpointing(average)
    return average


def _fit(run: _Run, steps: int) -> EvalRecord | None:
    """Train to the last step, then evaluate on the held-out data if there is any."""
    options, out = run.request.options, run.request.out
    report = (
        Report(
            out,
            steps,
            run.say,
            begun=run.progress.step,
            quiet=run.request.quiet,
            tensorboard=options.tensorboard,
        )
        if run.accelerator.is_main_process
        else Silent()
    )
    schedules = Schedules(
        steps,
        math.ceil(run.stage.warmup * steps),
        options.schedule,
        options.log_every,
        options.save_every,
        options.eval_every,
    )

    def save(progress: Progress) -> None:
        states.save(run.accelerator, out, progress, run.facts)

    trainer = Trainer(
        run.accelerator,
        run.model,
        run.optimizer,
        options.clip,
        schedules,
        report,
        save,
        run.average.update if run.average else None,
    )
    held_out = run.feeds.held_out
    try:
        feed = run.feeds.training.steps(run.progress.step)
        trainer.fit(feed, run.progress, held_out.once if held_out else None)
        if held_out is None:
            return None
        final = trainer.evaluate(held_out.once(), steps)
        report.evaluated(final)
        return final
    finally:
        report.close()


def _write(run: _Run) -> None:
    """The checkpoint: whole weights, adapters merged, averaged weights where there are any."""
    state: dict[str, Tensor] = run.accelerator.get_state_dict(run.model)
    if not run.accelerator.is_main_process:
        return
    if run.average is not None:
        state = run.average.replacing(state)
    scales = setup.lora_scales(run.bare)
    whole = lora.merged(state, scales)
    tensors = {
        part.name: _Arrays({key: whole[f"{part.name}.{key}"] for key in part.shapes})
        for part in components(run.source.model)
        if part.shapes
    }
    request = run.request
    trained.write_into(
        request.out,
        run.source.model,
        run.source.tokenizer,
        tensors,
        dtype=request.options.dtype,
        origin=run.source.origin,
        training={**run.facts, "step": run.progress.step, "samples_seen": run.progress.samples},
        made_by=request.made_by,
    )


class _Arrays(dict[str, Any]):
    """Tensors that are read as float32 arrays."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key).detach().cpu().float().numpy()


def _nothing(message: str) -> None:
    return None
