"""A vision tower by itself as a trainable module: pixels in, one embedding per image out.

CLIP (arXiv 2103.00020) and MLCD (arXiv 2407.17331) give the class token behind its norm, UNICOM
(arXiv 2304.05884) the output of its four-layer head, here with real batch norms.
"""

from __future__ import annotations

from collections.abc import Callable
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
from edgevlm.training.train_ops import TrainOps
from edgevlm.training.vlm import Layer, attach

KINDS = ("clip", "mlcd", "unicom")
BATCH_EPS = 2e-5  # of UNICOM's batch norms


class StochasticDepth(Wrapper[Tensor]):
    """Leaves out updates of blocks at random, per image (Huang et al., arXiv 1603.09382).

    rate_of: the rate in the block at a path, asked at each call; 0 for none.
    """

    def __init__(self, inner: Any, rate_of: Callable[[str], float]) -> None:
        super().__init__(inner, "")
        self.rate_of = rate_of

    def block(self, function: Callable[..., R], w: Weights[Tensor], *args: Any) -> R:
        rate = self.rate_of(".".join(w.steps))
        if not rate:
            return super().block(function, w, *args)

        def dropping(op: Any, w: Weights[Tensor], *args: Any) -> R:
            return function(DroppedUpdates(op, rate), w, *args)

        return super().block(dropping, w, *args)


class DroppedUpdates(Wrapper[Tensor]):
    """The ops of one block: the updates that it adds are 0 for some images.

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
    original); in training mode only. recompute: gradient checkpointing of every layer. Parameters
    start at random, reproducibly by `seed`; state-dict names are those of the encoder file, and
    `feature.*` for UNICOM's head, as in the published file.
    Raises ConfigError for a kind that is not trained by itself, or a UNICOM without head.
    """

    def __init__(
        self,
        kind: str,
        config: Any,
        *,
        drop_path: float = 0.0,
        recompute: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"there is no tower {kind!r} to train", hint=f"known: {KINDS}")
        if drop_path and kind != "unicom":
            raise ConfigError(f"{kind} has no stochastic depth (drop_path = {drop_path})")
        self.kind, self.config = kind, config
        self.drop_path, self.recompute = drop_path, recompute
        self.channels = config.embedding_dim if kind == "unicom" else config.hidden_size
        layers = {path: Layer(path) for path in (f"layers.{i}" for i in range(config.num_layers))}
        for path, layer in layers.items():
            attach(self, path, layer)
        for name, array in RandomWeights(self.shapes(), seed, kind).items():
            attach(self, name, nn.Parameter(torch.from_numpy(array)))
        if kind == "unicom":
            self.feature = _unicom_head(config, seed)
        self.train_ops = TrainOps(layers, recompute=recompute)

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
        if self.train_ops.device != str(pixels.device):  # tables stay where they were made
            self.train_ops = TrainOps(self.train_ops.layers, recompute=self.recompute)
            self.train_ops.device = str(pixels.device)
        op: Any = self.train_ops
        op = StochasticDepth(op, self.drop_rate) if self.drop_path else op
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
