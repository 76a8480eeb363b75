"""What reading a checkpoint gives, and the functions that both checkpoint layouts need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints import packed, partial
from edgevlm.toolkit.checkpoints.packed import Packing
from edgevlm.toolkit.checkpoints.weights import (
    Checkpoint,
    RandomWeights,
    Recipes,
    Shapes,
    TorchReader,
    check_tables,
)
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.recipes import Recipe
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.vlm.components import GOLDEN_TOKENS, components
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig
from edgevlm.toolkit.vlm.towers import TowerConfig

NewMerger = Callable[[ComponentConfig, Shapes], Mapping[str, Array]]


@dataclass(frozen=True)
class Options:
    """How to read a checkpoint: the choices that the command line offers.

    vision_tower: a folder, a weight file or a model id. offline: download no tower.
    base: the base model of a LoRA adapter or of a projector alone, a folder or a model id.
    packing: how the weights are packed that another program quantized; None if none are.
    new_merger: makes the merger's tensors, from its configuration and their shapes, where a new
    model is put together from a language model and towers; the folder then holds none. heads,
    pooling: of a tower by itself, where its file does not say how many heads it has, and in place
    of the usual embedding.
    """

    system: str | None = None
    vision_tower: Path | None = None
    ignore_keys: tuple[str, ...] = ()
    max_context: int | None = None
    torch_reader: TorchReader | None = None
    quirks: tuple[str, ...] = ()
    offline: bool = True
    base: Path | None = None
    new_merger: NewMerger | None = None
    packing: Packing | None = None
    heads: int | None = None
    pooling: str | None = None


@dataclass(frozen=True)
class Source:
    """A model ready to be written or run; each weight is read when it is used.

    plan: the precision in which the model is to be recorded; a bundle brings its own. goldens: the
    file with the float model's answers if the source is a bundle.
    """

    model: ModelConfig
    weights: Mapping[str, Mapping[str, Array]]
    tokenizer: str
    origin: Mapping[str, Any]
    plan: PrecisionPlan = PrecisionPlan()
    goldens: Path | None = None


@dataclass(frozen=True)
class TowerSource:
    """The same of a vision tower by itself, which has no tokenizer."""

    model: TowerConfig
    weights: Mapping[str, Mapping[str, Array]]
    origin: Mapping[str, Any]
    plan: PrecisionPlan = PrecisionPlan()
    goldens: Path | None = None


AnySource = Source | TowerSource


def with_language_model(source: AnySource, name: str) -> Source:
    """The source of a whole model. Raises ConfigError for a vision tower by itself."""
    if isinstance(source, Source):
        return source
    raise ConfigError(
        f"{name} is a vision tower by itself, and this is for models with a language model",
        hint="train has stages of towers (edgevlm train list), and new models: --tower KIND=FOLDER",
    )


def random_tower(model: TowerConfig, seed: int, preset: str) -> TowerSource:
    """The source of a tower's preset: published shapes, random weights from `seed`."""
    weights = {c.name: RandomWeights(c.shapes, seed, c.name) for c in components(model)}
    return TowerSource(model, weights, {"preset": preset, "random_weights": True, "seed": seed})


def random_source(model: ModelConfig, seed: int, tokenizer: str, preset: str) -> Source:
    """The source of a preset: published shapes, random weights from `seed`."""
    weights = {c.name: RandomWeights(c.shapes, seed, c.name) for c in components(model)}
    return Source(
        model, weights, tokenizer, {"preset": preset, "random_weights": True, "seed": seed}
    )


def open_weights(folder: Path, options: Options) -> Checkpoint:
    """The weights of a folder, joined with its base, or unpacked. Raises CheckpointError."""
    found = partial.open_joined(folder, options.base, options.torch_reader)
    return found if options.packing is None else packed.unpacked(found, options.packing)


def read_source(
    model: ModelConfig,
    weights: Mapping[str, Recipes],
    tokenizer: str,
    origin: Mapping[str, Any],
    packing: Packing | None,
) -> Source:
    """The source of a checkpoint; linears of the language model that it holds packed stay so."""
    if packing is None:
        return Source(model, weights, tokenizer, origin)
    plan = packed.plan(model.lm.name, weights[model.lm.name], packing)
    return Source(model, weights, tokenizer, {**origin, "quantization": str(packing)}, plan)


@dataclass(frozen=True)
class ComponentTensors:
    """The tensors of one component inside one checkpoint."""

    table: Mapping[str, Recipe]
    shapes: Mapping[str, tuple[int, ...]]
    checkpoint: Checkpoint

    def weights(self) -> Recipes:
        """The component's tensors, each made when it is used."""
        return Recipes(self.table, self.checkpoint)


class _Unstored:
    """Tensors that no file holds yet, under the names that a published checkpoint would have."""

    def __init__(self, table: Mapping[str, Recipe], tensors: Mapping[str, Array]) -> None:
        self._places = {
            source: (name, number)
            for name, recipe in table.items()
            for number, source in enumerate(recipe.sources)
        }
        self._table = table
        self._tensors = tensors

    def keys(self) -> Iterable[str]:
        return self._places

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.read(key).shape)

    def read(self, key: str) -> Array:
        name, number = self._places[key]
        undo = self._table[name].undo
        assert undo is not None
        return undo(self._tensors[name])[number]


def new_tensors(
    table: Mapping[str, Recipe], shapes: Shapes, tensors: Mapping[str, Array]
) -> ComponentTensors:
    """A component whose tensors were made, not read.

    Raises ConfigError if one cannot be stored as the published format does.
    """
    for name, recipe in table.items():
        if recipe.undo is None:
            raise ConfigError(
                f"{name} of a new model would be made of {', '.join(recipe.sources)}, which is not "
                "implemented",
                hint="choose a merger without batch norms",
            )
    made = _Unstored(table, tensors)
    return ComponentTensors(table, shapes, Checkpoint(dict.fromkeys(made.keys(), made), "new"))


def check(tensors: Iterable[ComponentTensors], unused: Iterable[str]) -> None:
    """Raise CheckpointError if a checkpoint lacks a tensor of its components or holds another.

    unused: globs of tensors that a checkpoint may hold and that are not read.
    """
    groups, globs = list(tensors), tuple(unused)
    for checkpoint in {id(group.checkpoint): group.checkpoint for group in groups}.values():
        tables = [(g.table, g.shapes) for g in groups if g.checkpoint is checkpoint]
        check_tables(tables, checkpoint, globs)


def below(table: Mapping[str, Recipe], prefix: str) -> dict[str, Recipe]:
    """The table with `prefix` before every source name."""
    return {name: recipe.below(prefix) for name, recipe in table.items()}


def find_prefix(table: Mapping[str, Recipe], checkpoint: Checkpoint, *prefixes: str) -> str:
    """The first of `prefixes` under which the checkpoint has one of the table's tensors.

    Raises CheckpointError if there is none.
    """
    sources = [source for recipe in table.values() for source in recipe.sources]
    for prefix in prefixes:
        if any(prefix + source in checkpoint for source in sources):
            return prefix
    raise CheckpointError(
        f"{checkpoint.where} has no tensor called {prefixes[0]}{sources[0]}",
        hint="check that config and weights belong together",
    )


def embed_from_head(table: Mapping[str, Recipe], checkpoint: Checkpoint) -> dict[str, Recipe]:
    """A tied language model's table, its embedding read from lm_head where only that is stored.

    Both are one tensor, of which a file may hold either name.
    """
    recipe = table["embed.weight"]
    (embed,) = recipe.sources
    for head in ("lm_head.weight", embed.replace("model.embed_tokens", "lm_head", 1)):
        if "head.weight" not in table and embed not in checkpoint and head in checkpoint:
            return {**table, "embed.weight": replace(recipe, sources=(head,))}
    return dict(table)


def read_encoder(config: Mapping[str, Any], where: str, options: Options) -> tuple[str, Reader]:
    """The encoder file for a tower's configuration, and a reader over its section of it.

    Raises ConfigError for a model_type that no encoder has.
    """
    kind, nested = config.get("model_type"), "vision_config" in config
    for name in models.kinds("encoders"):
        if kind in getattr(models.encoder(name), "MODEL_TYPES", ()):
            reader = Reader(config, where, options.ignore_keys)
            reader = reader.sub("vision_config") if nested else reader
            reader.ignore("tower")
            return name, reader
    known = [t for n in models.kinds("encoders") for t in models.encoder(n).MODEL_TYPES]
    raise ConfigError(
        f"{where}: model_type = {kind!r} is not an encoder we implement",
        hint=f"implemented: {', '.join(sorted(known))}",
    )


def with_context(lm: ComponentConfig, limit: int | None) -> ComponentConfig:
    """The language model with rotary tables for at most `limit` positions; None for all it has.

    Raises ConfigError for fewer than a bundle's check needs, or more than the model has.
    """
    context = lm.config.context if limit is None else limit
    if context < GOLDEN_TOKENS:
        stated = "max_position_embeddings" if limit is None else "--max-context"
        raise ConfigError(
            f"{stated} {context} is less than {GOLDEN_TOKENS}, the tokens of a bundle's check",
            hint="an image alone takes tens to thousands of positions",
        )
    if limit is None:
        return lm
    if limit > lm.config.context:
        raise ConfigError(
            f"--max-context {limit} is more than the {lm.config.context} positions of the model"
        )
    return replace(lm, config=replace(lm.config, context=limit))
