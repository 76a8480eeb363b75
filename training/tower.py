"""A vision tower by itself as a trainable module: pixels in, one embedding per image out.

CLIP (arXiv 2103.00020) and MLCD (arXiv 2407.17331) give the class token behind its norm, UNICOM
(arXiv 2304.05884) the output of its four-layer head, here with real batch norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from edgevlm.toolkit import models
from edgevlm.toolkit.checkpoints.weights import RandomWeights
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.encoders import unicom
from edgevlm.toolkit.ops.vocabulary import R, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.training.torch_ops import TorchOps

KINDS = ("clip", "mlcd", "unicom")
BATCH_EPS = 2e-5  # of UNICOM's batch norms


class Part(nn.Module):
    """A node of the tree of parameters; a layer's node runs the layer.

    So hooks of a layer (gradient sharding, compilation) see its call, and its parameters are read
    inside that call, when a wrapper has made them whole.
    """

    def forward(self, function: Callable[..., R], op: Any, steps: tuple[str, ...], *args: Any) -> R:
        """function(op, w, *args), where `w` are this module's own tensors below the path `steps`.

        Weights are no argument: a sharded module would take their tensors for its inputs.
        """
        path = ".".join(steps)
        own = {f"{path}.{name}": p for name, p in self.named_parameters()}
        return function(op, Weights(own, steps), *args)


def grow(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Register parameters below `root`: "layers.0.norm1.weight" stands in three nested Parts."""
    for name, tensor in tensors.items():
        *steps, leaf = name.split(".")
        node = root
        for step in steps:
            if step not in node._modules:
                node.add_module(step, Part())
            node = node.get_submodule(step)
        node.register_parameter(leaf, nn.Parameter(tensor))


class _LayerOps(TorchOps):
    """TorchOps that run each block through the module which holds its parameters."""

    def __init__(self, tower: Tower, device: str) -> None:
        super().__init__(device, checkpoint=tower.checkpoint)
        self._tower = tower

    def block(self, function: Callable[..., R], w: Weights[Tensor], *args: Any) -> R:
        path = ".".join(w.steps)
        rate = self._tower.drop_rate(path)

        def through_module(op: Any, w: Weights[Tensor], *args: Any) -> R:
            inner = StochasticDepth(op, rate) if rate else op
            result: R = self._tower.get_submodule(path)(function, inner, w.steps, *args)
            return result

        return super().block(through_module, w, *args)


class StochasticDepth(Wrapper[Tensor]):
    """Leaves out a block's updates at random, per image (Huang et al., arXiv 1603.09382).

    Blocks of toolkit/models/vit.py add the update as the first operand; what is kept is divided by
    the share that is kept, so that evaluation needs no factor.
    """

    def __init__(self, inner: Any, rate: float) -> None:
        super().__init__(inner, "")
        self.rate = rate

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        keep = 1 - self.rate
        mask = torch.empty(a.shape[0], 1, 1, dtype=a.dtype, device=a.device).bernoulli_(keep)
        return self.inner.add(a * (mask / keep), b)


class Tower(nn.Module):
    """pixels [B, 3, height, width] -> embeddings [B, channels], not normalised to length 1.

    kind: one of KINDS; config: the Config of toolkit/models/encoders/KIND.py. drop_path: rate of
    stochastic depth in the last block of UNICOM, growing linearly from 0 in the first (0.1 in the
    original); in training mode only. checkpoint: run each layer again in the backward pass instead
    of keeping its values. Parameters start at random, reproducibly by `seed`; state-dict names are
    those of the encoder file, and `feature.*` for UNICOM's head, as in the published file.
    Raises ConfigError for a kind that is not trained by itself, or a UNICOM without head.
    """

    def __init__(
        self,
        kind: str,
        config: Any,
        *,
        drop_path: float = 0.0,
        checkpoint: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"there is no tower {kind!r} to train", hint=f"known: {KINDS}")
        if drop_path and kind != "unicom":
            raise ConfigError(f"{kind} has no stochastic depth (drop_path = {drop_path})")
        self.kind, self.config = kind, config
        self.drop_path, self.checkpoint = drop_path, checkpoint
        self.channels = config.embedding_dim if kind == "unicom" else config.hidden_size
        drawn = RandomWeights(self.shapes(), seed, kind)
        grow(self, {name: torch.from_numpy(array) for name, array in drawn.items()})
        if kind == "unicom":
            self.feature = _unicom_head(config, seed)
        self._ops: dict[str, _LayerOps] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the encoder file, without UNICOM's head."""
        if self.kind == "unicom":
            return unicom.shapes(tokens_only(self.config))
        file: Any = models.encoder(self.kind)
        found: dict[str, tuple[int, ...]] = file.embed_shapes(self.config)
        return found

    def drop_rate(self, path: str) -> float:
        """The rate of stochastic depth in the block at `path` ("layers.3"), now."""
        if not self.training or not self.drop_path:
            return 0.0
        last: int = max(self.config.num_layers - 1, 1)
        return self.drop_path * int(path.split(".")[-1]) / last

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, height, width] -> [B, channels]; UNICOM's head computes in float32."""
        device = str(pixels.device)
        if device not in self._ops:
            self._ops[device] = _LayerOps(self, device)
        op: Any = self._ops[device]
        w = Weights(dict(self.named_parameters()))
        if self.kind != "unicom":
            file: Any = models.encoder(self.kind)
            embedding: Tensor = file.embed(op, self.config, w, pixels)
            return embedding
        (tokens,) = unicom.forward(op, tokens_only(self.config), w, pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            joined: Tensor = self.feature(tokens.flatten(1).float())
        return joined


def tokens_only(config: unicom.Config) -> unicom.Config:
    """The same UNICOM without its head."""
    return replace(config, embedding_dim=0)


def _unicom_head(c: unicom.Config, seed: int) -> nn.Sequential:
    """Linear, batch norm, linear, batch norm over all tokens of an image."""
    if not c.embedding_dim:
        raise ConfigError("a UNICOM tower is trained with its head (embedding_dim is 0)")
    sizes = [(c.patches * c.hidden_size, c.hidden_size), (c.hidden_size, c.embedding_dim)]
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(sizes):
        # Made empty: torch's own initial values would cost time, and depend on the global seed.
        linear = nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")
        name = f"head.{number}.weight"
        drawn = RandomWeights({name: (inputs, outputs)}, seed, "unicom")[name]
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(drawn).T)
        layers += [linear, nn.BatchNorm1d(outputs, eps=BATCH_EPS)]
    return nn.Sequential(*layers)
