"""A vision tower's training from its options to a tower in the published layout.

Beside the files of every run (run.py), at the end:

OUT/config.json, model.safetensors, preprocessor_config.json      the tower
OUT/states/*/classes-*.safetensors      the class matrix, a file for each process
OUT/clusters/                           what --classes makes, see labels.py
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training import setup, stages
from edgevlm.training.data.image_samples import Picture
from edgevlm.training.feed import Feed
from edgevlm.training.loop import Progress
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
from edgevlm.training.setup import FaultLog, Feeds, Say
from edgevlm.training.towers import labels as tower_labels
from edgevlm.training.towers import options as tower_options
from edgevlm.training.towers.class_matrix import load_classes, save_classes
from edgevlm.training.towers.data import ImageSet, Pictures, open_set, with_labels
from edgevlm.training.towers.files import published_config, save_tower_into
from edgevlm.training.towers.labels import Clustering
from edgevlm.training.towers.models import open_tower
from edgevlm.training.towers.options import TowerOptions
from edgevlm.training.towers.parts import Head, make_head, make_optimizers
from edgevlm.training.towers.stages import TowerStage as TowerStage
from edgevlm.training.towers.task import ClassTask
from edgevlm.training.towers.tower import Tower

MICRO_BATCH = 64  # images of one forward pass where nothing else is said
_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")


@dataclass(frozen=True)
class TowerRequest:
    """A run. model: as tower_models.open_tower takes it; say: prints a line of progress.

    image_size: to which the tower is resized; the stage's, which must be the tower's, if None.
    """

    stage: str
    model: str
    out: Path
    options: TrainOptions
    own: TowerOptions
    image_size: int | None
    resume: bool
    made_by: str
    say: Say
    quiet: bool = False
    ignore_keys: Sequence[str] = ()
    offline: bool = False


@dataclass(frozen=True)
class _Parts:
    """What a run is made from. clusters: whether the classes are still to be made."""

    stage: TowerStage
    accelerator: Any
    tower: Tower
    head: Head
    training: ImageSet
    held_out: ImageSet | None
    clusters: bool


def train_tower(request: TowerRequest) -> Result:
    """Run a stage. Raises ToolkitError; a killed run leaves OUT with its last state to resume."""
    started = time.perf_counter()
    run, tower = _set_up(request)
    final = fit(run)
    for line in run.feeds.faults.report().lines():
        run.home.say(f"note: {line}")
    if run.accelerator.is_main_process:
        run.home.say(f"writing {request.out}")
        if run.average is not None:
            tower.load_state_dict(run.average.replacing(tower.state_dict()))
        save_tower_into(tower, request.out)
    run.accelerator.wait_for_everyone()
    return result(run, final, time.perf_counter() - started, tower.kind)


def _set_up(request: TowerRequest) -> tuple[Run, Tower]:
    options, own = request.options, request.own
    tower_options.refuse_for_tower(options, request.stage)
    stage = tower_options.applied(stages.find_tower(request.stage), options, own)
    if request.image_size is not None:
        stage = replace(stage, image_size=request.image_size)
    check_out(request.out, resume=request.resume)
    accelerator = setup.accelerator(options.precision)
    say = request.say if accelerator.is_main_process else _nothing
    setup.seed_everything(options.seed)
    parts = _parts(request, stage, accelerator, say)
    progress = Progress()
    feeds = _feeds(parts, options, progress)
    steps = options.steps or max(round(stage.epochs * feeds.training.steps_per_epoch), 1)
    facts = _facts(request, parts, steps)
    say(
        f"{sum(p.numel() for p in parts.tower.parameters()):,} parameters, "
        f"{parts.head.matrix.num_classes:,} classes, {steps} steps"
    )
    home = Home(request.out, request.resume, options, facts, request.made_by, say, request.quiet)
    tower_optimizer, head_optimizer = make_optimizers(stage, parts.tower, parts.head)
    open_home(home, accelerator)
    if parts.clusters:
        parts.tower.to(accelerator.device)
        feeds = _clustered(parts, feeds, home)
    model, prepared = accelerator.prepare(parts.tower, tower_optimizer)
    accelerator.register_for_checkpointing(progress)
    average = average_of(accelerator, parts.tower, options.ema)
    _keep_classes(accelerator, parts.head, head_optimizer)
    task = ClassTask(parts.tower, parts.head, accelerator.device, stage.loss == "partial_fc")
    run = Run(
        home,
        stage.name,
        accelerator,
        progress,
        feeds,
        task,
        parts.tower,
        model,
        (prepared, head_optimizer),
        stage.warmup_share,
        stage.schedule,
        average,
        "image",
    )
    go_on(run)
    return run, parts.tower


def _parts(request: TowerRequest, stage: TowerStage, accelerator: Any, say: Say) -> _Parts:
    """The tower, the images and the head. Raises ToolkitError for whatever does not fit."""
    options, own = request.options, request.own
    if accelerator.distributed_type.value not in _PLAIN:
        raise ConfigError(
            f"towers are not trained under {accelerator.distributed_type.value} yet",
            hint="plain processes (DDP): the class matrix is split over them all the same",
        )
    tower = open_tower(
        request.model,
        image_size=request.image_size,
        drop_path=stage.drop_path,
        recompute=options.recompute,
        seed=options.seed,
        ignore_keys=request.ignore_keys,
        offline=request.offline,
    )
    _check_size(tower, stage)
    published_config(tower)  # what could not be saved is not trained
    if not options.data:
        raise ConfigError("there is nothing to train on", hint="--data FOLDER")
    say(f"reading {', '.join(options.data)}")
    clusters = own.classes is not None
    training, held = setup.told_by_first(
        accelerator, lambda: _opened(options, own, clusters=clusters)
    )
    if own.classes is not None:
        tower_labels.check(own.classes, stage.labels, len(training.usable))
    count = own.classes or training.num_classes
    head = make_head(stage, tower.channels, num_classes=count, seed=options.seed)
    head.to(accelerator.device)
    return _Parts(stage, accelerator, tower, head, training, held, clusters)


def _opened(
    options: TrainOptions, own: TowerOptions, *, clusters: bool
) -> tuple[ImageSet, ImageSet | None]:
    """Training and held-out images."""
    training = open_set(options.data, options.images, own.labels, clustered=clusters)
    if not options.eval_data:
        return training, None
    if own.labels is not None and own.eval_labels is None:
        raise ConfigError(
            "the training images have a label file, the held-out ones none",
            hint="--eval-labels FILE, with the same clusters",
        )
    held = open_set(
        options.eval_data,
        options.images,
        own.eval_labels,
        clustered=clusters,
        classes=training.names,
    )
    if (held.num_classes or 0) > (training.num_classes or 0):
        raise ConfigError(
            f"{own.eval_labels} has classes up to {held.num_classes}, training has "
            f"{training.num_classes}"
        )
    return training, held


def _check_size(tower: Tower, stage: TowerStage) -> None:
    side = tower.config.pixels[0]
    if side != stage.image_size:
        raise ConfigError(
            f"the tower takes images of {side} pixels, {stage.name} those of {stage.image_size}",
            hint=f"--image-size {side} keeps the tower's, --image-size {stage.image_size} "
            "resizes the tower",
        )


def _feeds(parts: _Parts, options: TrainOptions, progress: Progress) -> Feeds:
    stage, accelerator = parts.stage, parts.accelerator
    dealt = setup.batching(
        stage.global_batch, options.micro_batch, accelerator.num_processes, MICRO_BATCH
    )
    norms = any(isinstance(m, nn.BatchNorm1d) for m in parts.tower.modules())
    if norms and dealt.batch < 2:
        raise ConfigError(
            "batch norms need at least 2 images at a time", hint="a larger --batch or --micro-batch"
        )
    faults = FaultLog(progress, parts.training.size, options.max_broken)
    pictures = Pictures(
        parts.training,
        stage.image_size,
        dealt.batch,
        stage.area,
        options.seed,
        least=2 if norms else 1,
        positives=stage.labels,
    )
    training = Feed(
        parts.training.data(),
        pictures,
        dealt,
        accelerator.process_index,
        faults.add,
        options.seed,
        workers=options.workers,
    )
    for fault in training.data.faults:
        faults.add(fault)
    if parts.held_out is None:
        return Feeds(training, None, faults)
    held_faults = FaultLog(Progress(), parts.held_out.size, options.max_broken)
    data = parts.held_out.data()
    for fault in data.faults:
        held_faults.add(fault)
    held = replace(
        training,
        data=data,
        made=replace(pictures, images=parts.held_out),
        on_fault=held_faults.add,
    )
    return Feeds(training, held, faults)


def _clustered(parts: _Parts, feeds: Feeds, home: Home) -> Feeds:
    """The feeds with the classes that clustering makes, or made before the run was cut off."""
    clustering = Clustering(
        parts.tower,
        home.out / tower_labels.FOLDER,
        parts.head.matrix.num_classes,
        parts.stage.labels,
        home.options.seed,
        parts.accelerator,
        home.say,
    )
    found = tower_labels.labels_of(clustering, feeds.training)
    training = _labelled(feeds.training, found, clustering.classes)
    if feeds.held_out is None:
        return replace(feeds, training=training)
    found = tower_labels.held_out_labels(clustering, feeds.held_out)
    held = _labelled(feeds.held_out, found, clustering.classes)
    return replace(feeds, training=training, held_out=held)


def _labelled(feed: Feed, labels: Any, classes: int) -> Feed:
    assert isinstance(feed.made, Pictures)
    images = with_labels(feed.made.images, labels, classes)
    return replace(feed, made=replace(feed.made, images=images))


def _keep_classes(accelerator: Any, head: Head, optimizer: Any) -> None:
    """Each process's part of the class matrix goes into the states, and comes back from them.

    accelerate does not know the head: it would average its gradients, and save one process's.
    """

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        save_classes(head.matrix, Path(folder), optimizer)

    def load(models: list[Any], folder: str) -> None:
        load_classes(head.matrix, Path(folder), optimizer)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _facts(request: TowerRequest, parts: _Parts, steps: int) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    stage, images = parts.stage, parts.training
    names = "\n".join(one.name for one in images.found if isinstance(one, Picture))
    config = json.dumps(published_config(parts.tower), sort_keys=True)
    return {
        "stage": stage.name,
        "model": request.model,
        "model_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "data": list(request.options.data),
        "samples": images.size,
        "images_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "labels": request.own.labels,
        "classes": parts.head.matrix.num_classes,
        "positives": stage.labels,
        "batch": stage.global_batch,
        "steps": steps,
        "rate": stage.learning_rate,
        "class_rate": stage.head_factor,
        "schedule": stage.schedule,
        "loss": [stage.loss, stage.scale, stage.margin, stage.sample_rate, stage.num_channels],
        "drop_path": stage.drop_path,
        "seed": request.options.seed,
    }


def _nothing(message: str) -> None:
    return None
