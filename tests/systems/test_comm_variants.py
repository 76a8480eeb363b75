"""COMM's format with every option: merges, levels, towers, language models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.systems import joined
from tests.systems.test_huggingface import TOKENIZER, clip_processor, scatter

hf: Any = joined.hf
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One checkpoint. levels: of both towers; config: options other than the defaults."""

    levels: tuple[Sequence[int], Sequence[int]] = ((0, 1, 2), (3,))
    config: dict[str, Any] = field(default_factory=dict)
    widths: tuple[int, int] = (32, 24)
    dino: dict[str, Any] = field(default_factory=dict)
    lm: str = "llama"
    text: dict[str, Any] = field(default_factory=dict)
    image: tuple[int, int] = (90, 61)


VARIANTS = {
    "defaults": Variant(),
    "linear before norm, raw": Variant(
        ((0, 2), (0, 3)),
        {"merge": "linear_norm", "scale": "raw", "clip_levels": [0, 2], "dinov2_levels": [0, 3]},
    ),
    "raw, two MLPs of 3": Variant(config={"scale": "raw", "mlp_depth": 2, "mlp_ratio": 3}),
    "weighted sum, no MLP": Variant(
        ((0, 1, 2), (0, 1, 2, 3)),
        {"merge": "layerscale", "mlp_depth": 0, "dinov2_levels": "all"}, image=(40, 100),
    ),
    "mean": Variant(
        ((1, 2), (2, 3)), {"merge": "mean", "clip_levels": [1, 2], "dinov2_levels": [2, 3]}
    ),
    "mean of the half": Variant(
        ((0, 1, 2), (1, 2, 3)), {"merge": "mean_half", "dinov2_levels": [1, 2, 3]}
    ),
    "convolutions of 1": Variant(config={"merge": "conv1"}, widths=(32, 16)),
    "convolutions of 3, eps": Variant(
        ((2,), (1, 3)), {"merge": "conv3", "clip_levels": [2], "dinov2_levels": [1, 3]}
    ),
    "registers, SwiGLU": Variant(
        dino={"num_register_tokens": 2, "use_swiglu_ffn": True, "mlp_ratio": 2},
        config={"layer_norm_eps": 1e-2},
    ),
    "square, mistral, nothing around images": Variant(
        config={"image_aspect_ratio": "square", "use_im_start_end": False}, lm="mistral",
        text={"sliding_window": 7, "num_key_value_heads": 1, "vocab_size": 1000},
    ),
}  # fmt: skip


def towers(v: Variant) -> tuple[Any, Any]:
    torch.manual_seed(8)
    clip = hf.CLIPVisionModel(hf.CLIPVisionConfig(
        hidden_size=v.widths[0], intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, patch_size=14, image_size=56,
    ))  # fmt: skip
    own = {"hidden_size": v.widths[1], "num_hidden_layers": 4, "num_attention_heads": 2,
           "patch_size": 14, "image_size": 98} | v.dino  # fmt: skip
    if "num_register_tokens" in v.dino:
        dino = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**own))
    else:
        dino = hf.Dinov2Model(hf.Dinov2Config(**own))
    for module in (clip.eval(), dino.eval()):
        scatter(module)
    return clip, dino


def merger_tensors(v: Variant, outputs: int) -> Tensors:
    """Random weights under our format's names, for the variant's merge."""
    g = torch.Generator().manual_seed(4)
    w: Tensors = {}
    merge = v.config.get("merge", "norm_linear")

    def linear(name: str, out: int, inner: int, *kernel: int) -> None:
        w[f"{name}.weight"] = torch.randn(out, inner, *kernel, generator=g) * inner**-0.5
        w[f"{name}.bias"] = 0.2 * torch.randn(out, generator=g)

    def norm(name: str, d: int) -> None:
        w[f"{name}.weight"] = 1 + 0.2 * torch.randn(d, generator=g)
        w[f"{name}.bias"] = 0.2 * torch.randn(d, generator=g)

    for branch, levels, d in zip(("clip", "dinov2"), v.levels, v.widths, strict=True):
        if not merge.startswith("mean"):
            w[f"{branch}.scale"] = torch.randn(len(levels), generator=g)
        for stem in (f"{branch}.{n}" for n in levels):
            if "linear" in merge:
                linear(f"{stem}.linear", d, d)
                norm(f"{stem}.norm" if merge == "norm_linear" else f"{stem}.post_norm", d)
            if merge.startswith("conv"):
                linear(f"{stem}.conv", d, d, int(merge[-1]), int(merge[-1]))
                norm(f"{stem}.bn", d)
                w[f"{stem}.bn.running_mean"] = torch.randn(d, generator=g)
                w[f"{stem}.bn.running_var"] = 0.5 + torch.rand(d, generator=g)
                w[f"{stem}.bn.num_batches_tracked"] = torch.tensor(3)
    d, ratio = v.widths[1], v.config.get("mlp_ratio", 4)
    for n in range(v.config.get("mlp_depth", 1)):
        linear(f"dinov2.mlp.{n}.fc1", ratio * d, d)
        linear(f"dinov2.mlp.{n}.fc2", d, ratio * d)
    linear("proj", outputs, sum(v.widths))
    return w


def prepared(w: Tensors, stem: str, x: torch.Tensor, merge: str, eps: float) -> torch.Tensor:
    """A level [tokens, d] before it is weighted."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    if "linear" in merge:
        y = norm(f"{stem}.norm", x) if merge == "norm_linear" else x
        y = F.linear(y, w[f"{stem}.linear.weight"], w[f"{stem}.linear.bias"])
        return y if merge == "norm_linear" else norm(f"{stem}.post_norm", y)
    if merge.startswith("conv"):
        grid = x.T.reshape(1, -1, 4, 4)
        grid = F.conv2d(grid, w[f"{stem}.conv.weight"], w[f"{stem}.conv.bias"], padding="same")
        stats = w[f"{stem}.bn.running_mean"], w[f"{stem}.bn.running_var"]
        grid = F.batch_norm(grid, *stats, w[f"{stem}.bn.weight"], w[f"{stem}.bn.bias"])
        return grid[0].flatten(1).T
    return x


def merged(v: Variant, w: Tensors, branch: str, levels: list[torch.Tensor]) -> torch.Tensor:
    merge, eps = v.config.get("merge", "norm_linear"), v.config.get("layer_norm_eps", 1e-5)
    numbers = v.levels[branch == "dinov2"]
    ready = [
        prepared(w, f"{branch}.{n}", x, merge, eps) for n, x in zip(numbers, levels, strict=True)
    ]
    if merge.startswith("mean"):
        shares = torch.ones(len(ready)) / (len(ready) - (merge == "mean_half"))
    else:
        shares = w[f"{branch}.scale"]
        shares = shares if v.config.get("scale") == "raw" else shares.softmax(0)
    return torch.stack([s * x for s, x in zip(shares, ready, strict=True)]).sum(0)


def features(v: Variant, clip: Any, dino: Any, w: Tensors, path: Path) -> torch.Tensor:
    square = v.config.get("image_aspect_ratio") == "square"
    view = joined.shown(path) if square else joined.padded(path)
    first = joined.pixels(56, view)
    other = clip_processor(56)(view, image_mean=MEAN, image_std=STD, return_tensors="pt")
    skip = 1 + v.dino.get("num_register_tokens", 0)
    with torch.no_grad():
        a = clip(first, output_hidden_states=True).hidden_states
        b = dino(other["pixel_values"], output_hidden_states=True).hidden_states
        v1 = merged(v, w, "clip", [a[n + 1][0, 1:] for n in v.levels[0]])
        v2 = merged(v, w, "dinov2", [b[n + 1][0, skip:] for n in v.levels[1]])
        for n in range(v.config.get("mlp_depth", 1)):
            fc1, fc2 = (f"dinov2.mlp.{n}.fc{i}" for i in (1, 2))
            v2 = F.gelu(F.linear(v2, w[f"{fc1}.weight"], w[f"{fc1}.bias"]))
            v2 = F.linear(v2, w[f"{fc2}.weight"], w[f"{fc2}.bias"])
        return F.linear(torch.cat([v1, v2], -1), w["proj.weight"], w["proj.bias"])


def write(work: Path, v: Variant, clip: Any, dino: Any, lm: Any, w: Tensors) -> None:
    for name, module in (("clip", clip), ("dino", dino), ("lm", lm)):
        module.save_pretrained(work / name)
    clip_processor(56).save_pretrained(work / "clip")
    processor = clip_processor(56)
    processor.image_mean, processor.image_std = MEAN, STD
    processor.save_pretrained(work / "dino")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, work / "lm")
    folder = work / "comm"
    folder.mkdir()
    save_file({k: t.contiguous() for k, t in w.items()}, folder / "model.safetensors")
    config = {"model_type": "edgevlm_comm", "clip": "clip", "dinov2": "dino",
              "language_model": "lm", "image_size": 56}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | v.config))


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids(name: str, tmp_path: Path) -> None:
    v = VARIANTS[name]
    lm = joined.language_model(v.lm, **({"vocab_size": 1002} | v.text))
    clip, dino = towers(v)
    w = merger_tensors(v, lm.config.hidden_size)
    write(tmp_path, v, clip, dino, lm, w)
    path = joined.image(tmp_path, *v.image)
    rows = features(v, clip, dino, w, path)
    prompt, embed = joined.ASK, lm.get_input_embeddings()
    before, after = joined.pieces("llama", prompt)
    if v.config.get("use_im_start_end", True):
        prompt = prompt.replace("<image>", "<im_start><image><im_end>")
        before = [*before, 1000]
        # After a special token the slow tokenizer adds no blank of its own.
        bare = len(joined.pieces("llama", "x")[0])
        after = [1001, *joined.pieces("llama", "x" + prompt.split("<im_end>")[1])[0][bare:]]
    whole = torch.cat([embed(torch.tensor(before)), rows, embed(torch.tensor(after))])[None]
    with torch.no_grad():
        answer = lm.generate(
            inputs_embeds=whole,
            attention_mask=torch.ones(whole.shape[:2], dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
        )[0].tolist()
    session = joined.opened(tmp_path / "comm")
    assert session.model.system == "comm"
    assert joined.answer_ids(session, prompt, [path], 16) == answer
    assert len(set(answer)) > 3
