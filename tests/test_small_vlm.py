"""The example with trained weights, as far as it goes without downloading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from examples import small_vlm, small_vlm_parts

ASKED = [
    ("what shape is in the image?", "circle", 0),
    ("what color is the shape?", "red", 0),
    ("is there a red shape?", "yes", 0),
    ("is there a red shape?", "no", 1),
    ("what color is the shape?", "teal", 1),
]


def test_questions_of_a_picture_come_in_pairs() -> None:
    samples = small_vlm_parts.conversations(ASKED, "train", paired=True)
    assert [sample["image"] for sample in samples] == ["train/0.png", "train/1.png"]
    for sample in samples:
        texts = [turn["value"] for turn in sample["conversations"]]
        assert [text.startswith("<image>\n") for text in texts] == [True, False, False, False]
        picture = int(sample["image"][6])
        plain = [text.removeprefix("<image>\n") for text in texts]
        found = set(zip(plain[::2], plain[1::2], strict=True))
        assert found < {item[:2] for item in ASKED if item[2] == picture} or picture == 1
        assert sum(answer in ("yes", "no") for _, answer in found) == 1


def test_captions_are_of_pictures_with_both_answers() -> None:
    (sample,) = small_vlm_parts.captions(ASKED, "train")
    assert sample["conversations"][1]["value"] == "a red circle"


def test_halves_are_rotated_together_as_pairs_were() -> None:
    stored = np.arange(2 * 4 * 3, dtype=np.float32).reshape(8, 3)  # two heads of four
    halves = small_vlm_parts._rotary_halves(stored, 2)
    assert halves[:4, 0].tolist() == [stored[i, 0] for i in (0, 2, 1, 3)]


def test_the_step_of_a_weight_is_the_head_of_its_block() -> None:
    stored = np.zeros((2, 40), np.uint8)  # rows of two blocks
    heads = np.asarray([[0.5, 2.0], [4.0, 0.25]], np.float16)
    stored.reshape(2, 2, 20)[:, :, :2] = heads[:, :, None].view(np.uint8).reshape(2, 2, 2)
    steps = small_vlm_parts._steps(stored, (2, 64))
    assert steps.shape == (2, 64)
    assert steps[:, ::32].tolist() == heads.tolist() == steps[:, 31::32].tolist()


def test_the_folder_is_a_llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = _fields()
    text = small_vlm_parts._text_config(fields)
    vision = {**_VISION, "image_size": small_vlm_parts.SIDE, "patch_size": small_vlm_parts.PATCH}
    monkeypatch.setattr(
        small_vlm_parts, "language_model", lambda packages, noise: (_lm(text), text, fields)
    )
    monkeypatch.setattr(small_vlm_parts, "tower", lambda packages, side: (_eye(vision), vision))
    small_vlm_parts.write_llava(tmp_path / "begin", tmp_path, 0)
    source = systems.load(tmp_path / "begin", Options())
    assert source.model.system == "llava"
    assert source.model.encoders[0].config.tokens == 16
    assert source.weights["merger"]["linears.1.weight"].std() == pytest.approx(0.1 / 8, rel=0.1)


def test_scores_are_exact_matches(tmp_path: Path) -> None:
    samples = small_vlm_parts.conversations(ASKED, "test", paired=False)
    questions = [small_vlm.asked(i, sample, tmp_path) for i, sample in enumerate(samples)]
    said = {q.number: "red" for q in questions}
    scores = small_vlm.score(questions, said)
    assert scores == {"all": 0.2, "shape": 0.0, "colour": 0.5, "yes or no": 0.0}
    train = tmp_path / "easy_vqa/data/train"
    train.mkdir(parents=True)
    (train / "questions.json").write_text(json.dumps(ASKED + ASKED[2:3]))
    blind = small_vlm.baselines(tmp_path, questions)
    assert blind["always 'yes'"]["all"] == 0.2
    assert blind["question alone"]["yes or no"] == 0.5


_VISION = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "num_channels": 3,
}


def _fields() -> dict[str, Any]:
    names = [f"<{i}>" for i in range(20)] + [chr(256 + i) for i in range(40)]
    names[0], names[2] = "<|endoftext|>", "<|im_end|>"
    return {
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [3] * 20 + [1] * 40,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _lm(text: dict[str, Any]) -> dict[str, Any]:
    d, ff, kv = text["hidden_size"], text["intermediate_size"], 32
    stem = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (text["vocab_size"], d),
        "model.norm.weight": (d,),
        stem + "input_layernorm.weight": (d,),
        stem + "post_attention_layernorm.weight": (d,),
        stem + "self_attn.q_proj.weight": (d, d),
        stem + "self_attn.k_proj.weight": (kv, d),
        stem + "self_attn.v_proj.weight": (kv, d),
        stem + "self_attn.o_proj.weight": (d, d),
        stem + "mlp.gate_proj.weight": (ff, d),
        stem + "mlp.up_proj.weight": (ff, d),
        stem + "mlp.down_proj.weight": (d, ff),
    }
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def _eye(vision: dict[str, Any]) -> dict[str, Any]:
    d, patch = vision["hidden_size"], vision["patch_size"]
    stem = "encoder.layer.0."
    shapes = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.position_embeddings": (1, 17, d),
        "embeddings.patch_embeddings.projection.weight": (d, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (d,),
        stem + "layer_scale1.lambda1": (d,),
        stem + "layer_scale2.lambda1": (d,),
    }
    linears = {f"attention.attention.{n}": (d, d) for n in ("query", "key", "value")}
    linears |= {"attention.output.dense": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for name, shape in linears.items():
        shapes |= {f"{stem}{name}.weight": shape, f"{stem}{name}.bias": shape[:1]}
    for name in ("norm1", "norm2"):
        shapes |= {f"{stem}{name}.weight": (d,), f"{stem}{name}.bias": (d,)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
