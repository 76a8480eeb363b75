"""LLaVA-NeXT and LLaVA-OneVision: random tiny models give transformers' own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.images import decode, preprocess, tiling
from tests.pipeline import engine_of
from tests.systems.test_huggingface import CLIP, LLAMA, add_tokenizer, scatter

hf: Any = transformers
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # (height, width)
SIGLIP = CLIP | {"num_hidden_layers": 2}
SIZES = [(190, 70), (70, 121), (60, 60), (333, 30), (57, 400)]


def processor(onevision: bool) -> Any:
    """The PIL processor of the class."""
    edge = {"height": 56, "width": 56}
    if onevision:
        from transformers.models.llava_onevision import image_processing_pil_llava_onevision as m

        return m.LlavaOnevisionImageProcessorPil(size=edge, image_grid_pinpoints=PINPOINTS)
    from transformers.models.llava_next import image_processing_pil_llava_next as n

    return n.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=edge, image_grid_pinpoints=PINPOINTS
    )


def save(folder: Path, onevision: bool, kind: str, aspect: str = "anyres_max_9") -> Any:
    """A random model with processor and tokenizer."""
    torch.manual_seed(9)
    text = hf.AutoConfig.for_model(kind, **(LLAMA | {"max_position_embeddings": 2048}))
    common = {"image_token_index": 1000, "image_grid_pinpoints": PINPOINTS, "text_config": text}
    if onevision:
        vision = hf.SiglipVisionConfig(**SIGLIP)
        config = hf.LlavaOnevisionConfig(vision_config=vision, vision_aspect_ratio=aspect, **common)
        model = hf.LlavaOnevisionForConditionalGeneration(config)
    else:
        config = hf.LlavaNextConfig(vision_config=hf.CLIPVisionConfig(**CLIP), **common)
        model = hf.LlavaNextForConditionalGeneration(config)
    scatter(model.eval())
    model.save_pretrained(folder)
    processor(onevision).save_pretrained(folder)
    add_tokenizer(folder)
    return model


def images(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    """Random images of these (width, height)."""
    found = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).resize((width, height)).save(path)
        found.append(path)
    return found


def expected_ids(
    model: Any, onevision: bool, folder: Path, prompt: str, files: list[Path], tokens: int
) -> list[int]:
    """transformers' own greedy answer; image tokens are counted from its own features."""
    opened = [Image.open(f).convert("RGB") for f in files]
    given = processor(onevision)([opened] if onevision else opened, return_tensors="pt")
    with torch.no_grad():
        features = model.model.get_image_features(**given)
    found = getattr(features, "pooler_output", features)
    lengths = [len(f) for f in found]
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = prompt
    for length in lengths:
        text = text.replace("<image>", "<placed>" * length, 1)
    ids = torch.tensor([tokenizer(text.replace("<placed>", "<image>"))["input_ids"]])
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
        do_sample=False, **given,
    )  # fmt: skip
    generated = [int(i) for i in answer[0, ids.shape[1] :]]
    assert len(set(generated)) > 3  # a model that repeats one token would prove little
    return generated


ONE = "USER: <image>\nWhat is in the image? ASSISTANT:"
TWO = "USER: <image>\n<image>\nWhat differs? ASSISTANT:"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_next_answers_like_transformers(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model = save(folder, False, kind)
    session = Session.open(engine_of(folder, tmp_path))
    for size in SIZES[: 5 if kind == "llama" else 2]:
        files = images(tmp_path, size)
        expected = expected_ids(model, False, folder, ONE, files, 12)
        answer = session.answer(Question(ONE, files, 12, template="none"))
        assert list(answer.token_ids) == expected, size
    files = images(tmp_path, *SIZES[:2])
    expected = expected_ids(model, False, folder, TWO, files, 12)
    assert list(session.answer(Question(TWO, files, 12, template="none")).token_ids) == expected


@pytest.mark.parametrize("aspect", ["anyres_max_9", "anyres_max_1"])
def test_onevision_answers_like_transformers(aspect: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model = save(folder, True, "qwen2", aspect)
    session = Session.open(engine_of(folder, tmp_path))
    for size in SIZES:
        files = images(tmp_path, size)
        expected = expected_ids(model, True, folder, ONE, files, 12)
        answer = session.answer(Question(ONE, files, 12, template="none"))
        assert list(answer.token_ids) == expected, size
    files = images(tmp_path, *SIZES[:2])
    expected = expected_ids(model, True, folder, TWO, files, 12)
    assert list(session.answer(Question(TWO, files, 12, template="none")).token_ids) == expected


@pytest.mark.parametrize("onevision", [False, True])
def test_views_are_bit_equal(onevision: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, onevision, "qwen2")
    rules = Session.open(engine_of(folder, tmp_path)).model.images
    assert rules.tiling is not None
    (rule,) = rules.encoders.values()
    for path in images(tmp_path, *SIZES):
        image = decode.load(path).rgb
        views = tiling.cut(image, rules.tiling)
        found = np.stack([preprocess.preprocess(view, rule) for view in views.images])
        expected = processor(onevision)([image], return_tensors="np")["pixel_values"][0]
        assert np.array_equal(found, expected[: len(found)])
