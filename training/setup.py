"""What a run is set up from: accelerate, the data, the model with what is trained in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from edgevlm.toolkit.checkpoints.layouts.source import Source
from edgevlm.toolkit.errors import ConfigError, needing
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.training import grown, lora, memory, optimizer, qat
from edgevlm.training.data.broken import BrokenSample, Report
from edgevlm.training.data.masking import check_template
from edgevlm.training.data.masks import MaskRules
from edgevlm.training.data.prepare import SampleRules, rules_for
from edgevlm.training.data.sampling import Batching
from edgevlm.training.feed import Feed, Prepared, open_data
from edgevlm.training.loop import Progress
from edgevlm.training.options import TrainOptions
from edgevlm.training.stages import Stage, Views
from edgevlm.training.vlm import VLM

MICRO_BATCH = 8  # samples of one forward pass where nothing else is said
Say = Callable[[str], None]
Found = TypeVar("Found")


def accelerator(precision: str) -> Any:
    """accelerate's Accelerator: devices and processes as `accelerate launch` or torchrun set them.

    Raises MissingExtra.
    """
    import torch

    with needing("accelerate", "train", purpose="training"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    # Without a word about it, processes on a machine without a GPU would not find one another.
    cpu = not torch.accelerator.is_available()
    if cpu:
        memory.return_freed_tensors()
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)


def seed_everything(seed: int) -> None:
    """Seed what draws during steps (dropout); every process draws its own numbers."""
    from accelerate.utils import set_seed

    set_seed(seed, device_specific=True)


def grown_for(stage: Stage, source: Source, seed: int) -> Source:
    """The model with the stage that ConvLLaVA appends first, if it has none yet."""
    if stage.fifth_stage is None:
        return source
    depths = getattr(source.model.encoders[0].config, "depths", ())
    if len(depths) >= grown.STAGES:
        return source  # a run that is repeated from its own result
    blocks, channels = stage.fifth_stage
    return grown.with_fifth_stage(source, blocks=blocks, width=channels, seed=seed)


def sample_rules(model: ModelConfig, stage: Stage, options: TrainOptions) -> SampleRules:
    """How samples are made for a stage: template, views of images, longest sample."""
    template = options.template or ("plain" if stage.text == "plain" else "auto")
    length = min(stage.max_length, model.lm.config.context)
    rules = rules_for(model, template, max_length=length)
    return replace(rules, images=shown(rules.images, stage.views))


def mask_rules(model: ModelConfig, tokenizer: Tokenizer) -> MaskRules | None:
    """How samples get masks; None for a model that makes none. Raises ConfigError for a tokenizer
    without the token of a mask.
    """
    if model.segmenter is None:
        return None
    token = tokenizer.id_of(model.segmenter.token)
    if token is None:
        raise ConfigError(f"the tokenizer does not know {model.segmenter.token}")
    return MaskRules(token, model.segmenter.pixels, model.images.upright)


def shown(images: ImageRules, views: Views) -> ImageRules:
    """The rules of images with single views: padded to a square, or as the tower crops them."""
    if views == "model":
        return images
    encoders = {
        name: rule.padded() if views == "pad" else replace(rule, pad=None)
        for name, rule in images.encoders.items()
    }
    order = images.arrangement
    if order is not None:
        order = replace(order, order="flat", newline=False)
    return replace(images, encoders=encoders, tiling=None, arrangement=order)


def batching(batch: int, micro_batch: int | None, processes: int, most: int) -> Batching:
    """How the samples of a step are dealt; most: samples of a forward pass if none is stated.

    Raises ConfigError if they cannot be dealt evenly.
    """
    each = batch // processes
    micro = micro_batch or next(
        (n for n in range(min(most, max(each, 1)), 1, -1) if each % n == 0), 1
    )
    if batch % (processes * micro):
        raise ConfigError(
            f"a batch of {batch} cannot be dealt to {processes} process(es) with {micro} at a time",
            hint=f"choose --batch as a multiple of {processes * micro}, or another --micro-batch",
        )
    return Batching(micro, processes, batch // (processes * micro))


class FaultLog:
    """Faulty samples as they are met: kept in the run's progress, counted against the limit."""

    def __init__(self, progress: Progress, size: int, limit: float) -> None:
        self._progress = progress
        self._size = size
        self._limit = limit

    def add(self, fault: BrokenSample) -> None:
        """Keep a fault. Raises DataError when there are too many."""
        if fault.name not in self._progress.faults:
            self._progress.faults[fault.name] = [fault.kind, fault.reason]
            self.report().check()

    def report(self) -> Report:
        """All faults so far."""
        made = Report(self._size, self._limit)
        for name, (kind, reason) in self._progress.faults.items():
            made.add(BrokenSample(name, kind, reason))
        return made


@dataclass(frozen=True)
class Feeds:
    """What the loop is fed: training data, and held-out data if there is any."""

    training: Feed
    held_out: Feed | None
    faults: FaultLog


def feeds(
    source: Source,
    stage: Stage,
    options: TrainOptions,
    progress: Progress,
    accelerator: Any,
    say: Say,
) -> Feeds:
    """Open and scan the data. Raises DataError."""
    if not options.data:
        raise ConfigError("there is nothing to train on", hint="--data PATH; docs/training.md")
    tokenizer = Tokenizer.from_text(
        source.tokenizer, source.model.prompts.sentencepiece, rows=source.model.lm.config.vocab_size
    )
    rules = sample_rules(source.model, stage, options)
    rules = replace(rules, masks=mask_rules(source.model, tokenizer))
    for note in check_template(rules.text, tokenizer):
        say(f"note: {note}")
    say(f"reading {', '.join(options.data)}")
    data = told_by_first(accelerator, lambda: open_data(options.data, options.images))
    faults = FaultLog(progress, data.size, options.max_broken)
    for fault in data.faults:
        faults.add(fault)
    training = Feed(
        data,
        Prepared(data.indexed, rules, tokenizer),
        batching(stage.batch, options.micro_batch, accelerator.num_processes, MICRO_BATCH),
        accelerator.process_index,
        faults.add,
        options.seed,
        stage.grouped,
        options.workers,
    )
    if not options.eval_data:
        return Feeds(training, None, faults)
    others = told_by_first(accelerator, lambda: open_data(options.eval_data, options.images))
    held_faults = FaultLog(Progress(), others.size, options.max_broken)
    for fault in others.faults:
        held_faults.add(fault)
    made = Prepared(others.indexed, rules, tokenizer)
    held = replace(training, data=others, made=made, on_fault=held_faults.add, grouped=False)
    return Feeds(training, held, faults)


def told_by_first(accelerator: Any, find: Callable[[], Found]) -> Found:
    """What the first process finds; the others are told. Its error is raised in all."""
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes == 1:
        return find()
    shared: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            shared[0] = find()
        except Exception as failed:  # every process has to end, not the first alone
            shared[0] = failed
    broadcast_object_list(shared)
    if isinstance(shared[0], Exception):
        raise shared[0]
    found: Found = shared[0]
    return found


def model(source: Source, stage: Stage, options: TrainOptions, plan: PrecisionPlan | None) -> VLM:
    """The model with its weights; only what the stage trains takes gradients.

    plan: the precision that its forward passes imitate.
    """
    wrap = qat.wrapper(plan) if plan else None
    made = VLM(source.model, recompute=options.recompute, wrap=wrap).load(source.weights)
    adapted: list[str] = []
    if options.lora:
        adapted = lora.add(
            made,
            options.lora,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            on=options.lora_on,
            seed=options.seed,
        )
    optimizer.freeze(made, stage, adapted=adapted)
    if options.compile:
        made.compile_layers()
    return made


def save_only(accelerator: Any, trained: set[str]) -> None:
    """Leave frozen weights out of the states of unsharded runs: the model's folder has them."""

    def drop(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        for state in weights:
            for name in list(state):
                if name.removeprefix("module.") not in trained:
                    del state[name]

    accelerator.register_save_state_pre_hook(drop)


def lora_scales(made: VLM) -> Mapping[str, float]:
    """What the product of an adapter's matrices is multiplied by, for each component."""
    return {name: op.lora_scale for name, op in made.train_ops.items()}
