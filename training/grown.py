"""ConvLLaVA's changes of its tower: a fifth stage, and larger images.

Source: alibaba/conv-llava; the stage is appended to a published ConvNeXt of four stages and
trained first. Neither change is stated in the LLaVA folder: the tower's own folder carries both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgevlm.toolkit.checkpoints.layouts.source import Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images.preprocess import Preprocess
from edgevlm.toolkit.models.encoders import convnext
from edgevlm.toolkit.models.recipes import Recipe
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig
from edgevlm.training import initial

STAGES = 5


class Joined(Mapping[str, Array]):
    """The tensors of several mappings, each read from the last that has it."""

    def __init__(self, *parts: Mapping[str, Array]) -> None:
        self._parts = {key: part for part in parts for key in part}

    def __getitem__(self, key: str) -> Array:
        return self._parts[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def with_fifth_stage(
    source: Source, *, blocks: int = 6, width: int = 3072, seed: int = 0
) -> Source:
    """The model with one more stage of `blocks` blocks and `width` channels, and a new merger.

    A token then stands for 64 x 64 pixels. The stage and the merger, whose inputs became wider,
    are drawn from `seed`. Raises ConfigError for a tower that is no ConvNeXt or already has five.
    """
    model, encoder = source.model, source.model.encoders[0]
    if not isinstance(encoder.config, convnext.Config) or model.merger.kind != "mlp":
        raise ConfigError(
            f"a fifth stage is appended to a ConvNeXt; {model.name} has {encoder.kind}",
            hint="start from a model of system convllava",
        )
    depths = encoder.config.depths
    if len(depths) >= STAGES:
        raise ConfigError(
            f"the tower of {model.name} already has {len(depths)} stages: {list(depths)}",
            hint="leave the fifth stage out",
        )
    if min(blocks, width) < 1:
        raise ConfigError(f"a stage of {blocks} blocks and {width} channels is none")
    grown = replace(encoder.config, depths=(*depths, blocks), dims=(*encoder.config.dims, width))
    model = _with_tower(model, grown)
    shapes = convnext.shapes(grown)
    older = source.weights[f"encoder.{encoder.name}"]
    stage = {key: shape for key, shape in shapes.items() if key not in older}
    merger = next(c for c in components.components(model) if c.name == "merger")
    weights = {
        **source.weights,
        f"encoder.{encoder.name}": Joined(older, initial.convolutions(stage, seed)),
        "merger": initial.merger(model.merger, merger.shapes, seed),
    }
    return replace(source, model=model, weights=weights)


def resized(model: ModelConfig, side: int) -> ModelConfig:
    """A ConvNeXt model for images of `side` x `side` pixels.

    Raises ConfigError for another tower, and a side that is not a multiple of its stride.
    """
    encoder = model.encoders[0]
    if not isinstance(encoder.config, convnext.Config):
        raise ConfigError(f"image_size = {side}: a {encoder.kind} takes one size of images only")
    stride = encoder.config.stride
    if side < stride or side % stride:
        raise ConfigError(f"image_size = {side} is no multiple of the tower's stride, {stride}")
    rules = {name: _sized(rule, side) for name, rule in model.images.encoders.items()}
    changed = _with_tower(model, replace(encoder.config, image_size=side))
    return replace(changed, images=replace(model.images, encoders=rules))


def _sized(rule: Preprocess, side: int) -> Preprocess:
    if rule.exact is not None:
        return replace(rule, exact=(side, side))
    return replace(rule, short_edge=side, crop=(side, side))


def _with_tower(model: ModelConfig, config: convnext.Config) -> ModelConfig:
    """The model with another ConvNeXt, and a projector that takes its channels."""
    encoder = replace(model.encoders[0], config=config)
    merger = replace(model.merger, config=replace(model.merger.config, inputs=config.hidden_sizes))
    return replace(model, encoders=(encoder,), merger=merger)


# -- back to the tower's folder ------------------------------------------------------------------


def as_grown(before: ModelConfig, after: ModelConfig) -> ModelConfig:
    """`before` with what may have become of its tower in `after`; unchanged for anything else."""
    old, new = before.encoders[0].config, after.encoders[0].config
    if not isinstance(old, convnext.Config) or not isinstance(new, convnext.Config):
        return before
    count = len(old.depths)
    started = replace(
        new, depths=new.depths[:count], dims=new.dims[:count], image_size=old.image_size
    )
    if started != old or before.merger.kind != "mlp" or len(before.encoders) != 1:
        return before
    grown = _with_tower(before, replace(new, image_size=old.image_size))
    return grown if new.image_size == old.image_size else resized(grown, new.image_size)


def differs(after: ModelConfig, before: ModelConfig) -> bool:
    """Whether the tower's configuration is another than before the training."""
    return after.encoders != before.encoders


def table_of(
    after: ModelConfig, before: ModelConfig, table: Mapping[str, Recipe]
) -> Mapping[str, Recipe]:
    """The recipes of the grown tower, below the prefix that `table` has for the tower before."""
    if not differs(after, before):
        return table
    encoder: ComponentConfig = after.encoders[0]
    names = convnext.names(encoder.config)
    (stored,), (plain,) = (t["stem.conv.weight"].sources for t in (table, names))
    prefix = stored.removesuffix(plain)
    return {name: recipe.below(prefix) for name, recipe in names.items()}


def tower_config(
    data: Mapping[str, Any], c: convnext.Config, selected: tuple[int, ...] | None
) -> dict[str, Any]:
    """The tower's config.json after training: its stages and the size of its images.

    selected: mm_vision_select_layer. Raises ConfigError if it takes away a block of another stage.
    """
    found = {**data, "image_size": c.image_size}
    count = len(c.depths)
    if count == len(data["depths"]):
        return found
    if selected != (-1,):
        raise ConfigError(
            f"mm_vision_select_layer {selected} takes a block from the last stage, which is "
            "another one now",
            hint="train with select layer -1",
        )
    found |= {"depths": list(c.depths), "hidden_sizes": list(c.dims), "num_stages": count}
    names = ["stem", *(f"stage{i + 1}" for i in range(count))]
    found |= {"stage_names": names, "out_features": names[-1:], "out_indices": [count]}
    return {key: value for key, value in found.items() if key != "_name_or_path"}


def tower_preprocessor(data: Mapping[str, Any], rule: Preprocess) -> dict[str, Any]:
    """The tower's preprocessor_config.json for the sizes that `rule` states."""
    found = dict(data)
    if rule.exact is not None:
        found["size"] = {"height": rule.exact[0], "width": rule.exact[1]}
    if rule.short_edge is not None:
        found["size"] = {"shortest_edge": rule.short_edge}
    if rule.crop is not None:
        found["crop_size"] = {"height": rule.crop[0], "width": rule.crop[1]}
    return found
