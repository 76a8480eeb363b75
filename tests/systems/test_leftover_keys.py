"""Folders as training leaves them answer as transformers does: leftover keys, tied weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import CheckpointError
from tests.pipeline import ask, engine_of
from tests.systems import joined
from tests.systems.test_huggingface import IMAGE, PROMPT, expected_ids, save
from tests.systems.test_original_goldens import Golden
from tests.systems.test_same_answer import copied

# What LLaVA's training wrote beside the keys of Hugging Face's class, at values that would matter.
LEFTOVERS: dict[str, Any] = {
    "hidden_size": 4096, "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[336, 672]],
    "intermediate_size": 14336, "max_position_embeddings": 32768, "mm_hidden_size": 1024,
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "linear",
    "mm_resampler_type": None, "mm_use_im_start_end": True, "mm_vision_select_feature": "cls_patch",
    "mm_vision_select_layer": -1, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "num_hidden_layers": 32, "rms_norm_eps": 0.5, "rope_theta": 5.0, "hidden_dropout": 0.5,
    "tokenizer_padding_side": "left", "unfreeze_mm_vision_tower": True, "use_mm_proj": True,
}  # fmt: skip


def edit(folder: Path, section: str | None, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if section is None else config[section]).update(changes)
    path.write_text(json.dumps(config))


def rename(folder: Path, renamed: dict[str, str]) -> None:
    """Store tensors under other names."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {renamed.get(key, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_keys_of_the_other_layout_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, "grouped heads")
    edit(folder, None, **LEFTOVERS)
    edit(folder, "text_config", unsloth_version="2024.9", max_window_layers=1, use_mrope=True)
    edit(folder, "vision_config", image_mean=[0, 0, 0], vocab_size=9, hidden_dropout=0.5)
    model = joined.hf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    expected = expected_ids(model, folder, PROMPT, 12)
    assert list(ask(engine_of(folder, tmp_path), PROMPT, [IMAGE], 12).token_ids) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("generation", [4, 5])
def test_tied_weights_may_be_stored_as_the_head_alone(generation: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    expected = expected_ids(save(folder, "qwen2 tied"), folder, PROMPT, 12)
    keys = list(load_file(folder / "model.safetensors"))
    names = {key: key for key in keys}
    if generation == 5:
        for key in keys:
            inner = key.replace("language_model.model.", "language_model.")
            names[key] = f"model.{inner}"
    (embed,) = (key for key in keys if key.endswith("embed_tokens.weight"))
    names[embed] = "lm_head.weight" if generation == 5 else "language_model.lm_head.weight"
    rename(folder, names)
    assert list(ask(engine_of(folder, tmp_path), PROMPT, [IMAGE], 12).token_ids) == expected


def test_tied_weights_of_llavas_own_layout_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    both, head = (copied("e2e_llava15", tmp_path / name)[1] for name in ("both", "head"))
    for folder in (both, head):
        edit(folder, None, tie_word_embeddings=True)
    tensors = load_file(head / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, head / "model.safetensors")
    found = [systems.load(folder, Options()).weights["lm"] for folder in (both, head)]
    assert "head.weight" not in found[1]
    assert (found[0]["embed.weight"] == found[1]["embed.weight"]).all()


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.embed_tokens.weight"])
def test_untied_weights_need_both(missing: str, tmp_path: Path) -> None:
    golden: tuple[Golden, Path] = copied("e2e_llava15", tmp_path)
    folder = golden[1]
    tensors = load_file(folder / "model.safetensors")
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 missing: {missing}"):
        systems.load(folder, Options())
