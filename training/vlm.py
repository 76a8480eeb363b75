"""VLM: a model of this project as a torch module, to be trained.

Its forward pass is the model functions of toolkit/models over TrainOps; what is added here is who
owns the parameters. Each layer (each `op.block` of the model) is a module that owns its own, the
unit that gradient checkpointing, sharding (FSDP2) and torch.compile work on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec, Specs
from edgevlm.toolkit.ops.vocabulary import Array, Ops, R, Weights
from edgevlm.toolkit.vlm import components, cost
from edgevlm.toolkit.vlm.components import ARRANGE, Component
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.training.train_ops import TrainOps

Batch = Mapping[str, Any]
Wrap = Callable[[TrainOps, Component], Ops[Tensor]]


class Node(nn.Module):
    """Parameters below one path; the children are named by the parts of the tensors' names."""


class Layer(Node):
    """A layer of a component: `path` is its own, "layers.3"."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(
        self, function: Callable[..., R], op: Ops[Tensor], steps: tuple[str, ...], *args: Any
    ) -> R:
        """function(op, w, *args), where w holds this layer's parameters and no others."""
        tensors = {f"{self.path}.{name}": x for name, x in self.named_parameters()}
        return function(op, Weights(tensors, steps), *args)


class VLM(nn.Module):
    """Encoders, merger and language model with the parameters of a ModelConfig.

    Parameters are called COMPONENT.TENSOR, as in the checkpoints that training writes. recompute:
    gradient checkpointing of every layer. wrap: puts a wrapper around the ops of a component (fake
    quantization).
    """

    _no_split_modules = ["Layer"]  # what accelerate shards as units

    def __init__(
        self, model: ModelConfig, *, recompute: bool = False, wrap: Wrap | None = None
    ) -> None:
        super().__init__()
        self.model = model
        parts = components.components(model)
        self.parts = {part.name: part for part in parts}
        self.train_ops: dict[str, TrainOps] = {}
        self.ops: dict[str, Any] = {}
        for part in parts:
            layers = {path: Layer(path) for path in block_paths(model, part)}
            for path, layer in layers.items():
                attach(self, f"{part.name}.{path}", layer)
            for key, shape in part.shapes.items():
                parameter = nn.Parameter(torch.empty(shape, dtype=torch.float32))
                attach(self, f"{part.name}.{key}", parameter)
            op = self.train_ops[part.name] = TrainOps(layers, recompute=recompute)
            self.ops[part.name] = wrap(op, part) if wrap else op

    def load(self, weights: Mapping[str, Mapping[str, Array]]) -> VLM:
        """Copy in the weights of a Source, by component; one tensor at a time."""
        with torch.no_grad():
            for name, part in self.parts.items():
                for key in part.shapes:
                    array = torch.from_numpy(weights[name][key].astype("float32"))
                    self.get_parameter(f"{name}.{key}").copy_(array)
        return self

    def layers(self) -> Iterator[Layer]:
        """Every layer of every component."""
        return (module for module in self.modules() if isinstance(module, Layer))

    def compile_layers(self, **options: Any) -> None:
        """torch.compile every layer; layers of one kind share the compiled code."""
        for layer in self.layers():
            layer.compile(**options)

    def forward(self, **batch: Any) -> Any:
        """Logits [B, P, vocabulary] of the positions `score` of a batch, see data/collate.py.

        Of a model that makes masks also their logits as the decoder gives them, [N, side, side].
        """
        for op in self.train_ops.values():
            op.device = batch["ids"].device  # where tables are kept
        features = self.features(batch)
        lm = self.model.lm.config
        none = features.new_zeros(0)
        names = (f"past.{i}.{kind}" for i in range(lm.num_layers) for kind in ("key", "value"))
        inputs = {
            "ids": batch["ids"],
            "rows": batch["rows"],
            "features": features,
            "start": batch["ids"].new_zeros(batch["ids"].shape[0]),
            "score": batch["score"],
            **dict.fromkeys(names, none),
        }
        outputs = self._run(self.model.lm.name, inputs)
        if self.model.segmenter is None:
            return outputs["logits"]
        return outputs["logits"], self._masks(outputs["hidden"], batch)

    def _masks(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Masks [N, side, side] of states [B, P, hidden_size], each on the map of its image."""
        features = self._run(components.MASK_ENCODER, {"pixels": batch["mask_pixels"]})
        rows, columns = batch["mask_states"].unbind(1)
        maps = features["features.0"].index_select(0, batch["mask_images"])
        inputs = {"hidden": hidden[rows, columns], "features": maps}
        return self._run(components.MASK_DECODER, inputs)["masks"]

    def features(self, batch: Batch) -> Tensor:
        """Rows of image tokens [F, hidden_size]: all views of all images of a batch."""
        values: dict[str, Tensor] = {}
        for encoder in self.model.encoders:
            outputs = self._run(
                f"encoder.{encoder.name}", {"pixels": batch["pixels"][encoder.name]}
            )
            values |= {f"{encoder.name}.{name.rsplit('.', 1)[1]}": x for name, x in outputs.items()}
        rows = self._run("merger", values)["features"]
        if ARRANGE not in self.parts:
            return rows
        placed = {"rows": batch["placed_rows"], "weights": batch["placed_weights"]}
        return self._run(ARRANGE, {"features": rows, **placed})["tokens"]

    def _run(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        part = self.parts[name]
        node = self.get_submodule(name) if part.shapes else None
        tensors = dict(node.named_parameters()) if node is not None else {}
        return part.forward(self.ops[name], Weights(tensors), inputs)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over the targets [B, P] that are not -100, in float32."""
    flat = logits.flatten(0, 1).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")


def block_paths(model: ModelConfig, part: Component) -> list[str]:
    """Paths of the layers of a component: those that its forward function runs as blocks."""
    return _traced(model, part).paths


def linear_weights(model: ModelConfig, part: Component) -> list[str]:
    """Names of the matrices that a component multiplies by in `linear`, in the order of use."""
    return list(dict.fromkeys(_traced(model, part).linears))


def _traced(model: ModelConfig, part: Component) -> _Paths:
    op = _Paths()
    axes = cost.image_axes(model, 1, 1) | {"sequence": 1, "context": 1}
    part.forward(op, Weights(Specs(part.shapes)), cost.inputs(part, axes))
    return op


class _Paths(ShapeOps):
    """Shapes alone; keeps the paths of blocks and linears."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.linears: list[str] = []

    def block(self, function: Callable[..., R], w: Weights[Spec], *args: Any) -> R:
        self.paths.append(".".join(w.steps))
        return super().block(function, w, *args)

    def linear(self, x: Spec, w: Weights[Spec]) -> Spec:
        self.linears.append(w.key("weight"))
        return super().linear(x, w)


def attach(root: nn.Module, name: str, item: nn.Parameter | nn.Module) -> None:
    """Make `item` the member of `root` at a dotted name, with nodes on the way."""
    *way, last = name.split(".")
    for part in way:
        if part not in root._modules:
            root.add_module(part, Node())
        root = cast(nn.Module, root._modules[part])
    if isinstance(item, nn.Parameter):
        root.register_parameter(last, item)
    else:
        root.add_module(last, item)


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """Elements of all parameters, and of those that are trained."""
    sizes = [(math.prod(p.shape), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
