"""COMM in our format against towers of transformers and the paper's merging in torch."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from tests.pipeline import ask, engine_of
from tests.systems.test_huggingface import CLIP, IMAGE, LLAMA, TOKENIZER, clip_processor, scatter

hf: Any = transformers
PROMPT = "USER: <im_start><image><im_end>\nWhat is in the image? ASSISTANT:"
CLIP_LEVELS, DINO_LEVELS, WIDTH = [0, 1, 2], [1, 3], 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def linear(generator: torch.Generator, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(outputs, inputs, generator=generator) * inputs**-0.5,
        "bias": torch.randn(outputs, generator=generator) * 0.1,
    }


def merger_tensors() -> dict[str, torch.Tensor]:
    """Random merger weights under our format's names."""
    g = torch.Generator().manual_seed(4)
    found: dict[str, torch.Tensor] = {}

    def add(stem: str, tensors: dict[str, torch.Tensor]) -> None:
        found.update({f"{stem}.{leaf}": tensor for leaf, tensor in tensors.items()})

    for branch, levels in (("clip", CLIP_LEVELS), ("dinov2", DINO_LEVELS)):
        found[f"{branch}.scale"] = torch.randn(len(levels), generator=g)
        for level in levels:
            add(f"{branch}.{level}.linear", linear(g, WIDTH, WIDTH))
            norm = {"weight": 1 + torch.randn(WIDTH, generator=g) / 5,
                    "bias": torch.randn(WIDTH, generator=g) / 5}  # fmt: skip
            add(f"{branch}.{level}.norm", norm)
    add("dinov2.mlp.0.fc1", linear(g, 4 * WIDTH, WIDTH))
    add("dinov2.mlp.0.fc2", linear(g, WIDTH, 4 * WIDTH))
    add("proj", linear(g, LLAMA["hidden_size"], 2 * WIDTH))
    return found


def merged(w: dict[str, torch.Tensor], branch: str, levels: list[torch.Tensor]) -> torch.Tensor:
    """sum of softmax(scale)_i Linear_i(LN_i(x_i)), the paper's Eq. 1 with our default weights."""
    total = torch.zeros_like(levels[0])
    numbers = CLIP_LEVELS if branch == "clip" else DINO_LEVELS
    for share, number, x in zip(w[f"{branch}.scale"].softmax(0), numbers, levels, strict=True):
        stem = f"{branch}.{number}"
        normed = F.layer_norm(x, (WIDTH,), w[f"{stem}.norm.weight"], w[f"{stem}.norm.bias"])
        total = total + share * F.linear(
            normed, w[f"{stem}.linear.weight"], w[f"{stem}.linear.bias"]
        )
    return total


def write(folder: Path, **changes: Any) -> tuple[Any, Any, Any, dict[str, torch.Tensor]]:
    """A COMM checkpoint; its towers, language model and merger."""
    torch.manual_seed(8)
    clip = hf.CLIPVisionModel(hf.CLIPVisionConfig(**CLIP)).eval()
    dino = hf.Dinov2Model(hf.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, patch_size=14, image_size=98
    )).eval()  # fmt: skip
    lm = hf.LlamaForCausalLM(hf.LlamaConfig(**(LLAMA | {"vocab_size": 1002}))).eval()
    folder.mkdir()
    for name, module in (("clip", clip), ("dino", dino), ("lm", lm)):
        scatter(module)
        module.save_pretrained(folder.parent / name)
    clip_processor(56).save_pretrained(folder.parent / "clip")
    processor = clip_processor(56)
    processor.image_mean, processor.image_std = list(MEAN), list(STD)
    processor.save_pretrained(folder.parent / "dino")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder.parent / "lm")
    tensors = merger_tensors()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "edgevlm_comm", "clip": "clip", "dinov2": "dino", "image_size": 56,
              "language_model": "lm", "clip_levels": "all",
              "dinov2_levels": DINO_LEVELS}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return clip, dino, lm, tensors


def expected_features(clip: Any, dino: Any, w: dict[str, torch.Tensor]) -> torch.Tensor:
    image = Image.open(IMAGE).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    first = clip_processor(56)(square, return_tensors="pt")["pixel_values"]
    other = clip_processor(56)
    second = other(square, image_mean=MEAN, image_std=STD, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        a = clip(first, output_hidden_states=True).hidden_states
        b = dino(second, output_hidden_states=True).hidden_states
        v1 = merged(w, "clip", [a[n + 1][:, 1:] for n in CLIP_LEVELS])
        v2 = merged(w, "dinov2", [b[n + 1][:, 1:] for n in DINO_LEVELS])
        for fc, act in (("fc1", F.gelu), ("fc2", lambda x: x)):
            v2 = act(F.linear(v2, w[f"dinov2.mlp.0.{fc}.weight"], w[f"dinov2.mlp.0.{fc}.bias"]))
        joined = torch.cat([v1, v2], -1)
        return F.linear(joined, w["proj.weight"], w["proj.bias"])[0]


def test_comm_is_the_papers_formula_and_answers_token_for_token(tmp_path: Path) -> None:
    clip, dino, lm, w = write(tmp_path / "comm")
    engine = engine_of(tmp_path / "comm", tmp_path)
    session = Session.open(engine)
    features = expected_features(clip, dino, w)
    from edgevlm.engines.runtime.clock import Clock
    from edgevlm.toolkit.images.decode import load

    found = session.vision.encode([load(IMAGE)], Clock()).rows
    np.testing.assert_allclose(found, features.numpy(), atol=2e-5 * float(features.abs().max()))
    before, after = PROMPT.split("<image>")
    ids = [session.tokenizer.encode(before), session.tokenizer.encode(after)[1:]]
    assert ids[0][-1] == 1000
    assert ids[1][0] == 1001
    embed = lm.get_input_embeddings()
    sequence = torch.cat([embed(torch.tensor(ids[0])), features, embed(torch.tensor(ids[1]))])[None]
    expected = lm.generate(
        inputs_embeds=sequence, attention_mask=torch.ones(sequence.shape[:2], dtype=torch.long),
        max_new_tokens=16, do_sample=False,
    )[0].tolist()  # fmt: skip
    assert list(ask(engine, PROMPT, [IMAGE], 16).token_ids) == expected
    assert len(set(expected)) > 3


def test_encoders_side_by_side_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevlm.engines.runtime import session as sessions
    from edgevlm.engines.runtime import vision
    from edgevlm.engines.runtime.clock import Clock
    from edgevlm.toolkit.images.decode import load

    write(tmp_path / "comm")
    engine = engine_of(tmp_path / "comm", tmp_path)
    assert vision.side_by_side(2, 8)
    assert not vision.side_by_side(2, 2)
    assert not vision.side_by_side(1, 64)
    monkeypatch.setattr(sessions, "threads_here", lambda: 8)
    before = set(threading.enumerate())
    with Session.open(engine, threads=1) as alone, Session.open(engine, threads=8) as together:
        one, many = (s.encode([load(IMAGE)], Clock()).rows for s in (alone, together))
        assert set(threading.enumerate()) - before
    np.testing.assert_allclose(one, many, atol=1e-5)
    assert set(threading.enumerate()) <= before


def test_levels_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "comm", dinov2_levels=[3, 4])
    with pytest.raises(ConfigError, match="dinov2_levels"):
        systems.load(tmp_path / "comm", Options())


def test_a_missing_tower_is_named(tmp_path: Path) -> None:
    write(tmp_path / "comm", clip="elsewhere")
    with pytest.raises(CheckpointError, match="elsewhere"):
        systems.load(tmp_path / "comm", Options())


def test_only_needed_levels_run_and_each_tower_runs_once(tmp_path: Path) -> None:
    write(tmp_path / "comm", dinov2_levels=[1])
    with pytest.raises(CheckpointError, match="unexpected"):  # nothing reads the merger's level 3
        systems.load(tmp_path / "comm", Options())
    source = systems.load(_without_level_three(tmp_path), Options())
    (_, dino) = source.model.encoders
    assert dino.config.taps == (2,)
    names = list(source.weights["encoder.dinov2"])
    assert any(name.startswith("layers.1.") for name in names)
    assert not any(name.startswith("layers.2.") for name in names)


def _without_level_three(work: Path) -> Path:
    from safetensors.torch import load_file

    path = work / "comm" / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("dinov2.3.")}
    tensors["dinov2.scale"] = tensors["dinov2.scale"][:1].clone()
    save_file(tensors, path)
    return work / "comm"
