"""SAM of the installed transformers, random and small, under the original's tensor names; and a
checkpoint of MLCD-Seg around it: the golden MLCD, whose tokenizer and rows get [SEG].
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import HERE

hf: Any = transformers
MLCD = HERE / "goldens/mlcd_llavanext_e2e"
_NAMES = (
    (r"^shared_image_embedding\.positional_embedding",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^vision_encoder\.patch_embed\.projection", "image_encoder.patch_embed.proj"),
    (r"^vision_encoder\.neck\.conv1", "image_encoder.neck.0"),
    (r"^vision_encoder\.neck\.layer_norm1", "image_encoder.neck.1"),
    (r"^vision_encoder\.neck\.conv2", "image_encoder.neck.2"),
    (r"^vision_encoder\.neck\.layer_norm2", "image_encoder.neck.3"),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"\.layer_norm_final_attn", ".norm_final_attn"),
    (r"\.upscale_conv1", ".output_upscaling.0"),
    (r"\.upscale_layer_norm", ".output_upscaling.1"),
    (r"\.upscale_conv2", ".output_upscaling.3"),
    (r"(hypernetworks_mlps\.\d|prediction_head)\.layers\.0", r"\1.layers.1"),
    (r"(hypernetworks_mlps\.\d|prediction_head)\.proj_in", r"\1.layers.0"),
    (r"(hypernetworks_mlps\.\d|prediction_head)\.proj_out", r"\1.layers.2"),
    (r"\.layer_norm(\d)", r".norm\1"),
    (r"\.point_embed\.", ".point_embeddings."),
)  # fmt: skip


def sam(
    *,
    image: int = 48,
    patch: int = 8,
    hidden_size: int = 24,
    heads: int = 3,
    layers: int = 2,
    window: int = 4,
    global_blocks: tuple[int, ...] = (1,),
    width: int = 32,
    mlp: int = 40,
    seed: int = 0,
) -> Any:
    """A random SamModel; positions too, which transformers begins with zeros."""
    torch.manual_seed(seed)
    vision = hf.SamVisionConfig(
        hidden_size=hidden_size, output_channels=width, num_hidden_layers=layers,
        num_attention_heads=heads, image_size=image, patch_size=patch, window_size=window,
        global_attn_indexes=list(global_blocks), mlp_dim=3 * hidden_size, num_pos_feats=width // 2,
    )  # fmt: skip
    prompts = hf.SamPromptEncoderConfig(
        hidden_size=width, image_size=image, patch_size=patch, mask_input_channels=4
    )
    masks = hf.SamMaskDecoderConfig(
        hidden_size=width, mlp_dim=mlp, iou_head_hidden_dim=width, num_attention_heads=8
    )
    config = hf.SamConfig(
        vision_config=vision.to_dict(),
        prompt_encoder_config=prompts.to_dict(),
        mask_decoder_config=masks.to_dict(),
    )
    model = hf.SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def original_names(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of facebookresearch/segment-anything."""
    found = {}
    for name, tensor in model.state_dict().items():
        for pattern, theirs in _NAMES:
            name = re.sub(pattern, theirs, name)
        if "shared_embedding" not in name and ".mask_embed." not in name:
            found[name] = tensor.detach().clone().contiguous()
    return found


def projection(hidden_size: int, width: int, seed: int = 1) -> torch.nn.Sequential:
    """text2sam_projection: two linears with a GELU between them."""
    torch.manual_seed(seed)
    linears = torch.nn.Linear(hidden_size, width), torch.nn.Linear(width, width)
    return torch.nn.Sequential(linears[0], torch.nn.GELU(), linears[1]).eval()


def masks_of(model: Any, prompts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """transformers' first masks [N, side, side] of prompts [N, width], each alone on one map
    [1, width, grid, grid], with no mask as the dense prompt."""
    dense = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    with torch.no_grad():
        found = [
            model.mask_decoder(
                features,
                model.get_image_wide_positional_embeddings(),
                prompt.reshape(1, 1, 1, -1),
                dense.expand_as(features),
                multimask_output=False,
            )[0][0, 0, 0]
            for prompt in prompts
        ]
    return torch.stack(found)


def checkpoint(folder: Path, model: Any, *, asked_for: float = 2.4) -> torch.nn.Sequential:
    """Write the checkpoint; returns its projection. asked_for: factor on the row of [SEG] in the
    output layer, as a random model would hardly say it.
    """
    shutil.copytree(MLCD, folder)
    for path in folder.rglob("*"):
        path.chmod(0o755)
    tensors = load_file(folder / "model.safetensors")
    width = model.config.vision_config.output_channels
    rows = len(json.loads((folder / "tokenizer.json").read_text())["added_tokens"])
    token = _with_token(folder)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.manual_seed(rows)
        table = tensors[key][:token]
        scale = asked_for if key.startswith("lm_head") else 1.0
        new = scale * table.std() * torch.randn(1, table.shape[1])
        tensors[key] = torch.cat([table, new.to(table.dtype)])
    made = projection(tensors["model.norm.weight"].shape[0], width)
    tensors |= {f"model.text2sam_projection.{k}": t for k, t in made.state_dict().items()}
    tensors |= {f"model.sam.{k}": t for k, t in original_names(model).items()}
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"sam_path": "./checkpoints/sam.pth", "vocab_size": token + 1}
    (folder / "config.json").write_text(json.dumps(config))
    return made


def _with_token(folder: Path) -> int:
    """Add [SEG] behind the last token of all tokenizer files; its id."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    number: int = 1 + max(token["id"] for token in data["added_tokens"])
    token = {"id": number, "content": "[SEG]", **flags, "special": True}
    data["added_tokens"].append(token)
    path.write_text(json.dumps(data))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if "added_tokens_decoder" in settings:
        own = {k: v for k, v in token.items() if k != "id"}
        settings["added_tokens_decoder"][str(number)] = own
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    added = folder / "added_tokens.json"
    if added.exists():
        added.write_text(json.dumps(json.loads(added.read_text()) | {"[SEG]": number}))
    return number


def sam_pixels(path: Path, side: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pixels as the original's resizing and padding make them, and the resized height, width."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    scale = side / max(picture.size)
    width, height = (int(n * scale + 0.5) for n in picture.size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1).float()
    mean, std = (
        torch.tensor(x).reshape(3, 1, 1)
        for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    padding = (0, side - width, 0, side - height)
    return torch.nn.functional.pad((pixels - mean) / std, padding), (height, width)


def enlarged(low: torch.Tensor, side: int, inner: tuple[int, int], size: tuple[int, int]) -> Any:
    """Logits [h, w] at the size of the image, as SAM's postprocess_masks computes them."""
    resize: Any = torch.nn.functional.interpolate
    square = resize(low[None, None], (side, side), mode="bilinear", align_corners=False)
    cut = square[..., : inner[0], : inner[1]]
    return resize(cut, size, mode="bilinear", align_corners=False)[0, 0].numpy()
