"""transformers: SAM's image encoder with the weights of a component that `make.py` wrote."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.tower_sides import make, walk
from edgevlm.toolkit.bundle.manifest import Tensors

hf: Any = transformers
_LINEARS = {"attention.out": "attn.proj", "mlp.up": "mlp.lin1", "mlp.down": "mlp.lin2"}
_NECK = {"1": "layer_norm1", "3": "layer_norm2"}


def open_sam(model: walk.Model, options: Namespace) -> tuple[walk.Encode, dict[str, str]]:
    """--set dtype=float32|bfloat16."""
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.settings["dtype"])
    data = json.loads((options.bundle / "manifest.json").read_text(encoding="utf-8"))
    segmenter = make.shortened(data["preset"]).model.segmenter
    assert segmenter is not None
    c = segmenter.encoder.config
    config = hf.SamVisionConfig(
        hidden_size=c.hidden_size, output_channels=c.output_size, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, image_size=c.image_size, patch_size=c.patch_size,
        window_size=c.window, global_attn_indexes=list(c.global_blocks),
        mlp_dim=c.intermediate_size, num_pos_feats=c.output_size // 2,
    )  # fmt: skip
    with torch.device("meta"):
        encoder = hf.SamVisionModel(config)
    stored = renamed(Tensors(options.bundle / "part.safetensors"), c)
    tensors = {f"vision_encoder.{key}": tensor.to(dtype) for key, tensor in stored.items()}
    encoder.load_state_dict(tensors, assign=True)
    encoder.eval()

    @torch.no_grad()
    def encode(pixels: Mapping[str, Any]) -> Any:
        (array,) = pixels.values()
        found = encoder(torch.from_numpy(array).to(dtype)).last_hidden_state
        return found.flatten(2).mT.float().numpy()

    return encode, {"torch": str(torch.__version__), "transformers": hf.__version__}


def renamed(stored: Mapping[str, Any], c: Any) -> dict[str, Tensor]:
    """Our tensors under the names of SamVisionEncoder."""

    def tensor(key: str) -> Tensor:
        return torch.from_numpy(np.array(stored[key]))

    found = {
        "pos_embed": tensor("position").reshape(1, c.grid, c.grid, c.hidden_size),
        "neck.conv1.weight": tensor("neck.0.weight").T[:, :, None, None].contiguous(),
        "neck.conv2.weight": tensor("neck.2.weight"),
    }
    for leaf in ("weight", "bias"):
        found[f"patch_embed.projection.{leaf}"] = tensor(f"patch.{leaf}")
        found |= {f"neck.{name}.{leaf}": tensor(f"neck.{i}.{leaf}") for i, name in _NECK.items()}
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}", f"layers.{i}"
        parts = [f"{ours}.attention.{name}" for name in "qkv"]
        found[f"{theirs}.attn.qkv.weight"] = torch.cat([tensor(f"{p}.weight").T for p in parts])
        found[f"{theirs}.attn.qkv.bias"] = torch.cat([tensor(f"{p}.bias") for p in parts])
        for axis, name in (("rows", "h"), ("columns", "w")):
            found[f"{theirs}.attn.rel_pos_{name}"] = tensor(f"{ours}.attention.relative.{axis}")
        for own, other in _LINEARS.items():
            found[f"{theirs}.{other}.weight"] = tensor(f"{ours}.{own}.weight").T.contiguous()
            found[f"{theirs}.{other}.bias"] = tensor(f"{ours}.{own}.bias")
        for leaf in ("weight", "bias"):
            for number in (1, 2):
                found[f"{theirs}.layer_norm{number}.{leaf}"] = tensor(f"{ours}.norm{number}.{leaf}")
    return found


if __name__ == "__main__":
    walk.measure(open_sam)
