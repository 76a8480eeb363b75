"""The prompt that a checkpoint asks for, from its folder to the answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgevlm import api
from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.vlm.config import from_json, to_json
from tests.conftest import HERE
from tests.pipeline import engine_of
from tests.systems.chat_templates import CHAT
from tests.systems.test_huggingface import IMAGE, expected_ids, save

GOLDEN = HERE / "goldens/e2e_llava15"
CHATML = CHAT["the 34b's ChatML"][0]
PROMPT = "<|im_start|>user\n<image>\nWhat is it?<|im_end|><|im_start|>assistant\n"


def test_auto_is_the_chat_template_from_folder_to_answer(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model = save(folder, "grouped heads")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    engine = engine_of(folder, tmp_path)
    with Session.open(engine) as session:
        assert session.model.prompts.chat_template == CHATML
        answer = session.answer(Question("What is it?", IMAGE, 12))
        same = session.answer(Question(PROMPT, IMAGE, 12, template="none"))
        other = session.answer(Question("What is it?", IMAGE, 12, template="vicuna_v1"))
    assert list(answer.token_ids) == expected_ids(model, folder, PROMPT, 12) == list(same.token_ids)
    assert answer.prompt_tokens == same.prompt_tokens != other.prompt_tokens
    again = systems.load(tmp_path / "bundle", Options())  # as a build records it again
    assert again.model.prompts.chat_template == CHATML
    older = to_json(again.model)
    del older["prompts"]["chat_template"], older["prompts"]["special_tokens"]
    assert from_json(older, "older").prompts.chat_template is None
    line = "template: the checkpoint's chat template (chat_template.json)"
    for path in (folder, tmp_path / "bundle"):
        assert line in api.inspect(path)[1]


def llama_3(folder: Path) -> None:
    """The golden in LLaVA's layout, its two control tokens called like Llama-3's."""
    shutil.copytree(GOLDEN / "llava-v1.5-tiny", folder)
    shutil.copytree(GOLDEN / "clip-vit-tiny", folder.parent / "clip-vit-tiny")
    (folder / "tokenizer.model").unlink()
    path = folder / "tokenizer.json"
    text = path.read_text().replace('"<s>"', '"<|begin_of_text|>"')
    path.write_text(text.replace('"</s>"', '"<|eot_id|>"'))
    (folder / "tokenizer_config.json").unlink()


def test_an_original_with_llama_3_gets_its_template(tmp_path: Path) -> None:
    llama_3(tmp_path / "some-next-8b")
    source = systems.load(tmp_path / "some-next-8b", Options())
    assert source.model.prompts.template == "llava_llama_3"
    shown = prompts.render(source.model.prompts, ["What?"], 1, "auto")
    assert shown.text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>")
    assert shown.stop == "<|eot_id|>"
    (line,) = (t for t in api.inspect(tmp_path / "some-next-8b")[1] if t.startswith("template"))
    assert line == "template: llava_llama_3 (the tokenizer has <|eot_id|>)"


def test_what_a_session_makes_of_control_tokens(tmp_path: Path) -> None:
    typed = "A</s>B<image>\x1fC"
    with Session.open(engine_of(GOLDEN / "llava-v1.5-tiny", tmp_path)) as session:
        kept = session.answer(Question(typed, IMAGE, 2))
        literal = session.answer(Question(typed, IMAGE, 2, literal=True))
        without = session.answer(Question(typed.replace("\x1f", ""), IMAGE, 2))
        with pytest.raises(InputError, match="0 image"):
            session.answer(Question("<image>", (), 2))
        assert session.answer(Question("<image>", (), 2, literal=True)).image_tokens == 0
        with pytest.raises(InputError, match="--literal"):
            session.answer(Question(typed, IMAGE, 2, template="none", literal=True))
    assert kept.notes == (
        "control tokens in the prompt's text: </s>; --literal reads them as text",
    )
    assert literal.notes == ()
    assert kept.image_tokens == literal.image_tokens
    assert literal.prompt_tokens > kept.prompt_tokens + 5  # letters instead of two tokens
    assert without.prompt_tokens < kept.prompt_tokens  # a control character has its own byte
