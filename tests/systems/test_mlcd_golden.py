"""MLCD in LLaVA-NeXT against the original code: AnyRes tiles, merge types, chat script, tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images import decode, preprocess, tiling
from edgevlm.toolkit.images.tiling import TokenArrangement
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text import prompts
from tests.pipeline import engine_of
from tests.systems.test_original_goldens import near

CASE = "mlcd_llavanext_e2e"


class Golden:
    """The golden folder: prompts, arrays and images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.inputs = dict(np.load(folder / "inputs.npz"))
        self.outputs = dict(np.load(folder / "outputs.npz"))
        self.images = [folder / "image0.png", folder / "image1.png"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Golden, Session]:
    from tests.conftest import golden_case

    golden = Golden(golden_case(CASE))
    return golden, Session.open(engine_of(golden.folder, tmp_path_factory.mktemp(CASE)))


def ids_of(prompt: prompts.Prompt) -> list[int]:
    joined: list[int] = []
    for number, run in enumerate(prompt.runs):
        joined += [-200] * bool(number) + list(run)
    return joined


def test_the_system_is_mlcd_and_tower_weights_come_from_the_checkpoint(
    built: tuple[Golden, Session],
) -> None:
    golden, session = built
    source = systems.load(golden.folder, Options())
    assert source.model.system == "mlcd"
    assert source.origin["tower_weights"] == "checkpoint"
    assert session.model.lm.config.vocab_size == golden.meta["vocab_len_after_resize"]


@pytest.mark.parametrize(("name", "count"), [("one_image", 1), ("two_images", 2)])
def test_questions_are_token_exact(built: tuple[Golden, Session], name: str, count: int) -> None:
    golden, session = built
    text = golden.meta[f"prompt_{name}"]
    assert ids_of(prompts.tokenize(session.model.prompts, session.tokenizer, text)) == (
        golden.inputs[f"{name}.input_ids"].reshape(-1).tolist()
    )
    answer = session.answer(Question(text, golden.images[:count], 24, template="none"))
    assert list(answer.token_ids) == golden.outputs[f"{name}.greedy_ids"].tolist()
    question = text.split("<image>\n")[-1].split("<|im_end|>")[0]
    again = session.answer(Question(question, golden.images[:count], 24))
    assert again.token_ids == answer.token_ids


@pytest.mark.parametrize(("name", "count"), [("chat", 1), ("chat2", 2)])
def test_the_chat_script_is_token_exact(
    built: tuple[Golden, Session], name: str, count: int
) -> None:
    golden, session = built
    turns = golden.meta["chat2_turns"] if count == 2 else [golden.meta["chat_first_user_turn"]]
    rules = session.model.prompts
    rendered = prompts.render(rules, turns, count, "mlcd_chat")
    ids = ids_of(prompts.tokenize(rules, session.tokenizer, rendered.text))
    assert ids == golden.inputs[f"{name}.input_ids"].reshape(-1).tolist()
    question = Question(turns[-1], golden.images[:count], 24, template="mlcd_chat",
                        history=turns[:-1])  # fmt: skip
    answer = session.answer(question)
    assert list(answer.token_ids) == golden.outputs[f"{name}.greedy_ids"].tolist()


def test_pixels_of_all_views_are_bit_equal(built: tuple[Golden, Session]) -> None:
    golden, session = built
    rules = session.model.images
    assert rules.tiling is not None
    (rule,) = rules.encoders.values()
    for number, path in enumerate(golden.images):
        image = decode.load(path).rgb
        views = tiling.cut(image, rules.tiling)
        assert views.grid == tuple(golden.meta[f"image{number}_grid_tiles_wh"])
        found = np.stack([preprocess.preprocess(view, rule) for view in views.images])
        assert np.array_equal(found, golden.outputs[f"image{number}.pixel_values_anyres"])
        single = preprocess.preprocess(image, rule)[None]
        assert np.array_equal(single, golden.outputs[f"image{number}.pixel_values_single"])


def test_features_are_near(built: tuple[Golden, Session]) -> None:
    golden, session = built
    from edgevlm.engines.runtime.clock import Clock

    for number, path in enumerate(golden.images):
        found = session.vision.encode([decode.load(path)], Clock())
        expected = golden.outputs[f"image{number}.projected"].reshape(-1, 64)
        near(found.rows[:-1], expected)
        near(found.rows[found.indices[0]], golden.outputs[f"image{number}.merged_tokens"])
        single = session.vision.encode([decode.load(path)], Clock(), tiles=False)
        near(single.rows[single.indices[0]], golden.outputs[f"image{number}.single_view_tokens"])


ARRANGEMENTS = {
    "merged_tokens": TokenArrangement(4, "spatial", unpad=True, newline=True),
    "merged_tokens_anyres_max": TokenArrangement(
        4, "spatial", unpad=True, newline=True, max_tiles=1
    ),
    "merged_tokens_spatial": TokenArrangement(4, "spatial"),
    "merged_tokens_flat": TokenArrangement(4),
    "merged_tokens_maxpool2x2": TokenArrangement(4, "spatial", pool=True),
    "merged_tokens_unpad_nobase": TokenArrangement(
        4, "spatial", unpad=True, newline=True, base=False
    ),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_merge_types(built: tuple[Golden, Session], name: str) -> None:
    golden, _ = built
    newline = SafetensorsFile(golden.folder / "model.safetensors").read("model.image_newline")
    for number in (0, 1):
        features = golden.outputs[f"image{number}.projected"]
        rows = np.concatenate([features.reshape(-1, 64), newline[None]])
        grid = tuple(golden.meta[f"image{number}_grid_tiles_wh"])
        size = tuple(golden.meta["image_sizes_wh"][number])
        order = ARRANGEMENTS[name]
        tokens = tiling.arrange(order, len(features), (grid[0], grid[1]), (size[0], size[1]))
        near(_mixed(order, rows, tokens), golden.outputs[f"image{number}.{name}"], 1e-6)


def _mixed(order: TokenArrangement, rows: Array, tokens: tiling.ArrangedTokens) -> Array:
    if order.pool:
        return NumpyOps().max_gather(rows, tokens.rows)
    return NumpyOps().weighted_gather(rows, tokens.rows, tokens.weights)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"image_aspect_ratio": "anyres_max_1"}, "merged_tokens_anyres_max"),
        ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "merged_tokens_maxpool2x2"),
        ({"mm_patch_merge_type": "spatial_unpad_nobase"}, "merged_tokens_unpad_nobase"),
        ({"image_grid_pinpoints": "(1x1),...,(1x3)"}, None),
    ],
)
def test_other_merge_types_from_checkpoint_to_answer(
    built: tuple[Golden, Session], tmp_path: Path, changes: dict[str, str], name: str | None
) -> None:
    """The checkpoint with another configuration, through bundle and engine."""
    golden, _ = built
    folder = tmp_path / "mlcd-checkpoint"
    folder.mkdir()
    for file in golden.folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((golden.folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    if "maxpool2x2" in str(changes):
        _without_newline(folder)
    if name is None:
        with pytest.raises(ConfigError, match="cannot be read"):
            systems.load(folder, Options())
        return
    from edgevlm.engines.runtime.clock import Clock

    session = Session.open(engine_of(folder, tmp_path))
    for number, path in enumerate(golden.images):
        found = session.vision.encode([decode.load(path)], Clock())
        near(found.rows[found.indices[0]], golden.outputs[f"image{number}.{name}"])


def _without_newline(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.image_newline"]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("model_type", ["qwen2", "llava", None])
def test_the_class_is_read_from_architectures(
    built: tuple[Golden, Session], tmp_path: Path, model_type: str | None
) -> None:
    """Published checkpoints carry the language model's own model_type beside the LLaVA class."""
    golden, _ = built
    folder = tmp_path / "mlcd-checkpoint"
    folder.mkdir()
    for file in golden.folder.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((golden.folder / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["LlavaQwenForCausalLM"]}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    source = systems.load(folder, Options())
    assert (source.model.system, source.model.lm.kind) == ("mlcd", "qwen2")
    if model_type == "qwen2":
        session = Session.open(engine_of(folder, tmp_path))
        question = Question(golden.meta["prompt_one_image"], golden.images[:1], 24, template="none")
        expected = golden.outputs["one_image.greedy_ids"].tolist()
        assert list(session.answer(question).token_ids) == expected
