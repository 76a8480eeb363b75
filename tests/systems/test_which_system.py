"""Which system a folder is of, and what is said of a folder that is of none or of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ToolkitError
from tests.refusals import TOWER, checkpoint_in

ORIGINAL = {"mm_vision_tower": "./clip-vit-tiny", "model_type": "llava_llama"}
HUGGINGFACE: dict[str, Any] = {
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model"},
}
NEXT = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
SYSTEMS = ["comm", "convllava", "llava", "llava_next", "mlcd", "mmfuser"]


def refusal(folder: Path, config: dict[str, Any], system: str | None = None) -> tuple[str, str]:
    """Message and hint of the refusal of a folder with this config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ToolkitError) as refused:
        systems.load(folder, Options(system=system))
    return refused.value.message, refused.value.hint


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llava_next_video", **HUGGINGFACE}, "'llava_next_video', .* of videos"),
        ({"architectures": ["VideoLlavaForConditionalGeneration"]}, "VideoLlava.* of videos"),
        ({"model_type": "idefics", **HUGGINGFACE}, "model_type 'idefics'.*not implemented"),
        ({"model_type": "qwen2"}, "'qwen2'.*a language model alone"),
        (
            {"mm_vision_tower": "a", "architectures": ["LlavaMptForCausalLM"]},
            r"architectures \['LlavaMptForCausalLM'\] is not implemented",
        ),
        ({}, "names no mm_vision_tower and no text_config"),
    ],
)
def test_a_folder_of_no_system_is_named_for_what_it_is(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    import re

    message, hint = refusal(tmp_path / "folder", config)
    assert re.search(reason, message), message
    assert "known: comm" in hint


def test_a_tower_that_no_system_has_is_named(tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path)
    (tmp_path / TOWER / "config.json").write_text('{"model_type": "dinov2"}')
    config = json.loads((folder / "config.json").read_text())
    message, _ = refusal(folder, config)
    assert "'dinov2' ('./clip-vit-tiny')" in message


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        ({"model_type": "qwen2"}, "lacks"),
        ({"model_type": "llava_next_video", **HUGGINGFACE}, ""),
        ({"mm_vision_tower": "a", "model_type": "qwen2"}, ""),
        ({"mm_vision_tower": "a", "architectures": ["LlavaMptForCausalLM"]}, ""),
        ({**HUGGINGFACE, **NEXT, "mm_vision_tower": "a"}, ""),
    ],
)
def test_a_system_chosen_for_a_folder_of_another_kind_says_what_is_missing(
    config: dict[str, Any], lacks: str, system: str, tmp_path: Path
) -> None:
    message, _ = refusal(tmp_path / "folder", config, system)
    assert "config.json" in message
    assert lacks in message


def test_a_convolutional_system_refuses_a_transformer_by_name(tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    message, _ = refusal(folder, config, "convllava")
    assert "needs a tower of kind convnext or unireplknet" in message
    assert "is clip" in message
