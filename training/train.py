"""A training run from its options to a checkpoint that `export` reads.

Beside the files of every run (run.py), at the end:

OUT/checkpoint.json, model*.safetensors, tokenizer.json
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edgevlm.toolkit.bundle import trained
from edgevlm.toolkit.checkpoints.layouts.source import Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.vlm.components import components
from edgevlm.toolkit.vlm.config import to_json
from edgevlm.training import lora, optimizer, setup, stages, with_sam
from edgevlm.training.answer_task import AnswerTask
from edgevlm.training.loop import Progress
from edgevlm.training.mask_task import MaskTask
from edgevlm.training.options import TrainOptions
from edgevlm.training.run import (
    Home,
    Result,
    Run,
    average_of,
    check_out,
    fit,
    go_on,
    open_home,
    result,
)
from edgevlm.training.setup import Feeds, Say
from edgevlm.training.stages import Stage
from edgevlm.training.vlm import VLM, parameter_count

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


def train(request: Request) -> Result:
    """Run a stage. Raises ToolkitError; a killed run leaves OUT with its last state to resume."""
    started = time.perf_counter()
    _refuse_packed(request)
    run, source = _set_up(request)
    final = fit(run)
    for line in run.feeds.faults.report().lines():
        run.home.say(f"note: {line}")
    run.home.say(f"writing {request.out}")
    _write(run, source)
    return result(run, final, time.perf_counter() - started)


def _refuse_packed(request: Request) -> None:
    """Raise ConfigError for GPTQ's and AWQ's weights: a checkpoint that is trained holds floats."""
    packed = request.source.origin.get("quantization")
    if packed is not None:
        raise ConfigError(
            f"{request.model} holds weights that another program quantized ({packed}), which are "
            "not trained",
            hint="train the float checkpoint that it was made from",
        )


def _set_up(request: Request) -> tuple[Run, Source]:
    options = request.options
    stage = optimizer.applied(stages.find_vlm(request.stage), options)
    if options.lora and options.rate is None:
        stage = replace(stage, rate=LORA_RATE)
    begun = with_sam.begun(request.source, options.sam, options.seed)
    stages.check_system(stage, begun.model.system)
    check_out(request.out, resume=request.resume)
    accelerator = setup.accelerator(options.precision)
    say = request.say if accelerator.is_main_process else _nothing
    setup.seed_everything(options.seed)
    source = setup.grown_for(stage, begun, options.seed)
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
    run = Run(
        Home(request.out, request.resume, options, facts, request.made_by, say, request.quiet),
        stage.name,
        accelerator,
        progress,
        feeds,
        _task(source, accelerator.device),
        bare,
        model,
        (opt,),
        stage.warmup,
        options.schedule or "cosine",
        average_of(accelerator, bare, options.ema),
    )
    open_home(run.home, accelerator)
    go_on(run)
    return run, source


def _task(source: Source, device: Any) -> AnswerTask:
    """What the model is trained for: text, and masks if it makes any."""
    segmenter = source.model.segmenter
    return AnswerTask(device) if segmenter is None else MaskTask(device, segmenter.pixels.side)


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
        "schedule": options.schedule or "cosine",
        "seed": options.seed,
        "lora": options.lora,
        "qat": options.qat,
        **({"sam": options.sam} if options.sam else {}),
        "trained": [f"{p.names}{'' if not p.frozen else ' frozen'}" for p in stage.trained],
    }


def _write(run: Run, source: Source) -> None:
    """The checkpoint: whole weights, adapters merged, averaged weights where there are any."""
    state: dict[str, Tensor] = run.accelerator.get_state_dict(run.model)
    if not run.accelerator.is_main_process:
        return
    if run.average is not None:
        state = run.average.replacing(state)
    assert isinstance(run.bare, VLM)
    scales = setup.lora_scales(run.bare)
    whole = lora.merged(state, scales)
    tensors = {
        part.name: _Arrays({key: whole[f"{part.name}.{key}"] for key in part.shapes})
        for part in components(source.model)
        if part.shapes
    }
    home = run.home
    trained.write_into(
        home.out,
        source.model,
        source.tokenizer,
        tensors,
        dtype=home.options.dtype,
        origin=source.origin,
        training={**home.facts, "step": run.progress.step, "samples_seen": run.progress.samples},
        made_by=home.made_by,
    )


class _Arrays(dict[str, Any]):
    """Tensors that are read as float32 arrays."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key).detach().cpu().float().numpy()


def _nothing(message: str) -> None:
    return None
