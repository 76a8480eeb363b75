"""Generation rules where the prompt is not plain ids: AnyRes images, and the original layout."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Question, Session
from tests.conftest import HERE
from tests.pipeline import engine_of
from tests.systems import test_huggingface_next as anyres

GOLDEN = HERE / "goldens/e2e_llava15"
PROMPT = "USER: tell me about the house, the house, the house ASSISTANT:"
TOKENS = 24

hf: Any = transformers


@pytest.mark.parametrize("onevision", [False, True])
def test_tiles_and_newlines_count_as_the_image_token(onevision: bool, tmp_path: Path) -> None:
    """min_length counts every position, and the answer must not end before it."""
    folder = tmp_path / "checkpoint"
    model = anyres.save(folder, onevision, "qwen2")
    files = anyres.images(tmp_path, anyres.SIZES[1])
    plain = anyres.expected_ids(model, onevision, folder, anyres.ONE, files, TOKENS)
    with Session.open(engine_of(folder, tmp_path), threads=1) as session:
        asked = Question(anyres.ONE, files, TOKENS, template="none")
        prompt_tokens = session.answer(asked).prompt_tokens
    settings: dict[str, Any] = {
        "eos_token_id": [plain[3], plain[10]],
        "min_length": prompt_tokens + 8,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [plain[:2], plain[4:5]],
    }
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    expected = anyres.expected_ids(model, onevision, folder, anyres.ONE, files, TOKENS)
    assert expected != plain
    model.generation_config.save_pretrained(folder)
    again = tmp_path / "again"
    again.mkdir()
    with Session.open(engine_of(folder, again), threads=1) as session:
        assert list(session.answer(asked).token_ids) == expected


# -- the original layout -----------------------------------------------------------------------


def original(folder: Path, settings: dict[str, Any]) -> Path:
    """The golden checkpoint, whose layers add little, so that answers repeat tokens."""
    from safetensors.torch import save_file

    shutil.copytree(GOLDEN, folder)
    checkpoint = folder / "llava-v1.5-tiny"
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = tensor * 0.6
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, checkpoint / "model.safetensors")
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    return checkpoint


def by_embeddings(checkpoint: Path, ids: list[int]) -> list[int]:
    """transformers' answer as the original asks for it: embeddings of the prompt, no ids."""
    read = json.loads((checkpoint / "config.json").read_text())
    keys = set(hf.LlamaConfig().to_dict()) - {"model_type", "architectures", "dtype"}
    config = hf.LlamaConfig(**{key: value for key, value in read.items() if key in keys})
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model = hf.LlamaForCausalLM(config).eval()
    tensors = load_file(checkpoint / "model.safetensors")
    wanted = {name: t.float() for name, t in tensors.items() if name in model.state_dict()}
    model.load_state_dict(wanted)
    model.generation_config = hf.GenerationConfig.from_pretrained(checkpoint)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor([ids]))
    with warnings.catch_warnings():  # that rules then apply to newly generated tokens only
        warnings.filterwarnings("ignore", "Passing .* with `inputs_embeds`")
        found = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
        )
    result: list[int] = found[0].tolist()
    return result


def test_originals_apply_the_rules_to_the_answer_alone(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    checkpoint = original(tmp_path / "golden", plain)
    engine = engine_of(checkpoint, tmp_path)
    question = Question(PROMPT, (), TOKENS, template="none")
    with Session.open(engine, threads=1) as session:
        ids = session.tokenizer.encode(PROMPT)
        free = list(session.answer(question).token_ids)
        assert free == by_embeddings(checkpoint, ids)
    cases: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "suppress_tokens": free[:1]},
        {"bad_words_ids": [[ids[-1], free[0]], free[7:9]]},
        {"eos_token_id": free[9], "min_length": len(ids) + 11},
        {"eos_token_id": free[9], "min_new_tokens": 10, "begin_suppress_tokens": free[:1]},
    ]
    for number, extra in enumerate(cases):
        (checkpoint / "generation_config.json").write_text(json.dumps(plain | extra))
        work = tmp_path / str(number)
        work.mkdir()
        with Session.open(engine_of(checkpoint, work), threads=1) as session:
            found = list(session.answer(question).token_ids)
        assert found == by_embeddings(checkpoint, ids), extra
        assert found != free, extra


def test_what_the_user_sets_holds_in_the_original_layout_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eos_token_id": 2, "repetition_penalty": 1.5}
    checkpoint = original(tmp_path / "golden", settings)
    with Session.open(engine_of(checkpoint, tmp_path), threads=1) as session:
        ids = session.tokenizer.encode(PROMPT)
        off = Sampling(repetition_penalty=1.0, no_repeat_ngram=2)
        found = session.answer(Question(PROMPT, (), TOKENS, off, template="none")).token_ids
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "no_repeat_ngram_size": 2})
    )
    assert list(found) == by_embeddings(checkpoint, ids)
