"""Image tokens of any name, and added tokens without a row, in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ConfigError, InputError
from tests.pipeline import ask, engine_of
from tests.systems import test_huggingface as facing
from tests.systems.test_tokenizer_files import declare, edit, token


def renamed(tmp_path: Path, name: str) -> tuple[Path, Any]:
    """A checkpoint in Hugging Face's layout whose image token has another name."""
    checkpoint = tmp_path / "checkpoint"
    model = facing.save(checkpoint, "grouped heads")
    text = (checkpoint / "tokenizer.json").read_text()
    (checkpoint / "tokenizer.json").write_text(text.replace('"<image>"', json.dumps(name)))
    return checkpoint, model


@pytest.mark.parametrize("name", ["<|image|>", "<|reserved_special_token_2|>"])
def test_an_image_token_of_another_name(name: str, tmp_path: Path) -> None:
    checkpoint, model = renamed(tmp_path, name)
    edit(checkpoint / "processor_config.json", image_token=name)
    engine = engine_of(checkpoint, tmp_path)
    expected = facing.expected_ids(
        model, checkpoint, facing.PROMPT.replace("<image>", name * 16), 12
    )
    for prompt in (facing.PROMPT, facing.PROMPT.replace("<image>", name)):
        found = ask(engine, prompt, [facing.IMAGE], 12)
        assert list(found.token_ids) == expected
    assert len(set(expected)) > 3


def test_a_processor_with_another_image_token_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = renamed(tmp_path, "<|image|>")
    edit(checkpoint / "processor_config.json", image_token="<image>")
    with pytest.raises(ConfigError, match=r"processor_config\.json: image_token = '<image>'.*1000"):
        systems.load(checkpoint, Options())


def test_an_added_token_without_a_row_is_refused_in_a_prompt_only(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    model = facing.save(checkpoint, "grouped heads")  # 1001 rows; the tokenizer gets 1002 ids
    declare(checkpoint, _1001=token("<late>"))
    expected = facing.expected_ids(model, checkpoint, facing.PROMPT, 8)
    engine = engine_of(checkpoint, tmp_path)
    assert list(ask(engine, facing.PROMPT, [facing.IMAGE], 8).token_ids) == expected
    with pytest.raises(InputError, match=r"'<late>'.*no embedding for \(id 1001 of 1001 rows\)"):
        ask(engine, "USER: a <late> b ASSISTANT:", [], 8)
