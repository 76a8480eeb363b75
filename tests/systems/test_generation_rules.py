"""generation_config.json: the same tokens as transformers' `generate` with the same file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from edgevlm import api
from edgevlm.engines import manifest
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Answer, Question, Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts import generation
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.vlm.generation import GenerationRules, described
from tests.conftest import HERE
from tests.pipeline import engine_of
from tests.systems.test_huggingface import (
    CLIP,
    IMAGE,
    PROMPT,
    clip_processor,
    load_tokenizer,
    save,
)

TEXT = "USER: tell me about the house, the house, the house ASSISTANT:"
TOKENS = 24


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint and its engine. Its layers add little, so that its answers repeat tokens."""
    folder = tmp_path_factory.mktemp("rules")
    model = save(folder / "checkpoint", "qwen2 tied")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= 0.15
    model.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint", engine_of(folder / "checkpoint", folder)


def write(folder: Path, settings: dict[str, Any], **config: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def transformers_ids(folder: Path, settings: dict[str, Any], text: str, **given: Any) -> list[int]:
    """The greedy answer of transformers with this generation_config.json in the folder."""
    write(folder, settings)
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    features = (CLIP["image_size"] // CLIP["patch_size"]) ** 2
    pixels: dict[str, Any] = {}
    if "<image>" in text:
        picture = Image.open(IMAGE).convert("RGB")
        pixels = dict(clip_processor(CLIP["image_size"])(picture, return_tensors="pt"))
    whole = text.replace("<image>", "<image>" * features)
    ids = torch.tensor([load_tokenizer(folder)(whole)["input_ids"]])
    found = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        **pixels,
        **given,
    )
    result: list[int] = found[0, ids.shape[1] :].tolist()
    return result


def answer(
    built: tuple[Path, Path], settings: dict[str, Any], text: str, sampling: Sampling | None = None
) -> Answer:
    """Ours, with the rules of the same file in the engine's model."""
    folder, engine = built
    write(folder, settings)
    model = systems.load(folder, Options()).model
    with Session.open(engine, threads=1) as session:
        prompts = replace(session.model.prompts, eos=model.prompts.eos)
        session.model = replace(session.model, generation=model.generation, prompts=prompts)
        images = [IMAGE] if "<image>" in text else []
        return session.answer(
            Question(text, images, TOKENS, sampling or Sampling(), template="none")
        )


PLAIN = {"bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def plain(built: tuple[Path, Path]) -> dict[str, list[int]]:
    """What transformers answers without rules: rules are made from its tokens."""
    return {text: transformers_ids(built[0], PLAIN, text) for text in (TEXT, PROMPT)}


# From the tokens of the plain answer: settings under which the answer must change.
RULES: dict[str, Any] = {
    "plain": lambda ids: {},
    "penalty": lambda ids: {"repetition_penalty": 1.5},
    "small penalty": lambda ids: {"repetition_penalty": 1.05},
    "reward": lambda ids: {"repetition_penalty": 0.8},
    "suppressed": lambda ids: {"suppress_tokens": ids[:2]},
    "suppressed first": lambda ids: {"begin_suppress_tokens": [ids[0], -1]},
    "no token twice": lambda ids: {"no_repeat_ngram_size": 1},
    "no pair twice": lambda ids: {"no_repeat_ngram_size": 2},
    "no triple twice": lambda ids: {"no_repeat_ngram_size": 3},
    "bad words": lambda ids: {"bad_words_ids": [[ids[1]], ids[2:4], ids[3:7], [998, 997]]},
    "bad words and an end": lambda ids: {"bad_words_ids": [[ids[5]]], "eos_token_id": [ids[5], 7]},
    "ends at a list": lambda ids: {"eos_token_id": [3, ids[4]]},
    "fewest new tokens": lambda ids: {"eos_token_id": ids[3], "min_new_tokens": 9},
    "fewest positions": lambda ids: {"eos_token_id": [ids[3], ids[6]], "min_length": 29},
    "both fewest": lambda ids: {"eos_token_id": ids[3], "min_length": 400, "min_new_tokens": 2},
    "all": lambda ids: {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[ids[1]], ids[2:4]],
        "suppress_tokens": [ids[0], 5000],
        "begin_suppress_tokens": [ids[2]],
        "min_new_tokens": 20,
        "eos_token_id": ids[4:9],
        "max_length": 30,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
    },
}
NEED_NOT_CHANGE = ("plain", "small penalty")


@pytest.mark.parametrize("text", [TEXT, PROMPT], ids=["text", "image"])
@pytest.mark.parametrize("name", RULES)
def test_greedy_ids_equal_those_of_generate(
    name: str, text: str, built: tuple[Path, Path], plain: dict[str, list[int]]
) -> None:
    settings = PLAIN | RULES[name](plain[text])
    expected = transformers_ids(built[0], settings, text)
    found = answer(built, settings, text)
    assert list(found.token_ids) == expected
    if name not in NEED_NOT_CHANGE:
        assert expected != plain[text]
    assert found.finish_reason == ("stop" if len(expected) < TOKENS else "length")


def test_image_positions_count_as_the_image_token(
    built: tuple[Path, Path], plain: dict[str, list[int]]
) -> None:
    """A word that the image token begins is banned after the image, as in transformers."""
    tokenizer = load_tokenizer(built[0])
    text = PROMPT.removesuffix("\nWhat is in the image? ASSISTANT:")
    free = transformers_ids(built[0], PLAIN, text)
    image = tokenizer.convert_tokens_to_ids("<image>")
    settings = PLAIN | {"bad_words_ids": [[image, image, free[0]]]}
    expected = transformers_ids(built[0], settings, text)
    assert expected[0] != free[0]
    assert list(answer(built, settings, text).token_ids) == expected


def test_an_image_token_of_another_name_counts_too(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """As in Llama 3's converted checkpoints, whose image token has a reserved token's name."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(built[0], folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<image>"', '"<|reserved_special_token_69|>"'))
    settings: dict[str, Any] = PLAIN | {"no_repeat_ngram_size": 1, "repetition_penalty": 1.3}
    text = PROMPT.removesuffix("\nWhat is in the image? ASSISTANT:")
    plain = transformers_ids(built[0], PLAIN, text)
    settings["bad_words_ids"] = [[1000, plain[0]]]
    expected = transformers_ids(built[0], settings, text)
    assert expected[0] != plain[0]
    found = answer((folder, engine_of(folder, tmp_path)), settings, text)
    assert list(found.token_ids) == expected


def test_an_image_repeats_pairs_of_its_own_token(built: tuple[Path, Path]) -> None:
    settings = PLAIN | {"no_repeat_ngram_size": 4, "repetition_penalty": 1.3}
    assert list(answer(built, settings, PROMPT).token_ids) == transformers_ids(
        built[0], settings, PROMPT
    )


def test_a_question_overrides_the_checkpoint(
    built: tuple[Path, Path], plain: dict[str, list[int]]
) -> None:
    settings = PLAIN | {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1}
    off = Sampling(repetition_penalty=1, no_repeat_ngram=0)
    assert list(answer(built, settings, TEXT, off).token_ids) == plain[TEXT]
    other = Sampling(repetition_penalty=1.2, no_repeat_ngram=2)
    expected = transformers_ids(
        built[0], settings, TEXT, repetition_penalty=1.2, no_repeat_ngram_size=2
    )
    assert expected != plain[TEXT]
    assert list(answer(built, settings, TEXT, other).token_ids) == expected


def test_the_tokens_that_a_checkpoint_bans_may_be_allowed(
    built: tuple[Path, Path], plain: dict[str, list[int]]
) -> None:
    first, second, *_ = plain[TEXT]
    settings: dict[str, Any] = PLAIN | {
        "suppress_tokens": [second], "begin_suppress_tokens": [first], "bad_words_ids": [[first]],
    }  # fmt: skip
    assert list(answer(built, settings, TEXT).token_ids) != plain[TEXT]
    allowed = Sampling(allow_banned=True)
    assert list(answer(built, settings, TEXT, allowed).token_ids) == plain[TEXT]
    held = settings | {"repetition_penalty": 1.5}  # other rules stay
    expected = transformers_ids(built[0], PLAIN | {"repetition_penalty": 1.5}, TEXT)
    assert list(answer(built, held, TEXT, allowed).token_ids) == expected


def test_a_stop_string_of_the_checkpoint_ends_its_answers(built: tuple[Path, Path]) -> None:
    whole = answer(built, PLAIN, TEXT).text
    found = answer(built, PLAIN | {"stop_strings": whole[5:8]}, TEXT)
    assert (found.text, found.finish_reason) == (whole[: whole.find(whole[5:8])], "stop")


def test_a_checkpoint_that_asks_for_sampling_says_so(built: tuple[Path, Path]) -> None:
    settings = PLAIN | {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
    greedy = answer(built, settings, TEXT)
    (note,) = greedy.notes
    assert "do_sample, temperature 0.2, top_p 0.9" in note
    drawn = answer(built, settings, TEXT, Sampling(0.2, top_p=0.9, seed=3))
    assert drawn.notes == ()


def test_sampling_draws_from_what_the_rules_leave(
    built: tuple[Path, Path], plain: dict[str, list[int]]
) -> None:
    settings = PLAIN | {"suppress_tokens": plain[TEXT][:1], "no_repeat_ngram_size": 1}
    prompt = load_tokenizer(built[0])(TEXT)["input_ids"]
    for seed in range(6):
        drawn = answer(built, settings, TEXT, Sampling(3.0, seed=seed)).token_ids
        assert len(set(drawn)) == len(drawn)
        assert not {*prompt, plain[TEXT][0]} & set(drawn)


def test_rules_that_ban_every_token_are_named(built: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="ban every token"):
        answer(built, PLAIN | {"suppress_tokens": list(range(1001))}, TEXT)


# -- reading -----------------------------------------------------------------------------------


def rules_of(tmp_path: Path, settings: dict[str, Any] | None, **config: Any) -> GenerationRules:
    if settings is not None:
        write(tmp_path, settings)
    return generation.read_rules(tmp_path, config, 1000)


PUBLISHED = {
    "llava-v1.5-7b": {
        "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0,
        "temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0",
    },
    "Qwen2.5-0.5B-Instruct": {
        "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True,
        "eos_token_id": [151645, 151643], "repetition_penalty": 1.1, "temperature": 0.7,
        "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0",
    },
    "llava-1.5-7b-hf": {
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001,
        "transformers_version": "4.36.0.dev0",
    },
}  # fmt: skip


def test_published_files_are_read(tmp_path: Path) -> None:
    found = {name: described(rules_of(tmp_path, data)) for name, data in PUBLISHED.items()}
    assert found == {
        "llava-v1.5-7b": "max_length 4096, temperature 0.9, top_p 0.6",
        "Qwen2.5-0.5B-Instruct": "repetition_penalty 1.1, do_sample true, temperature 0.7, "
        "top_k 20, top_p 0.8",
        "llava-1.5-7b-hf": "",
    }


def test_every_key_of_the_installed_transformers_is_known(tmp_path: Path) -> None:
    """Its own defaults and a saved file are read; none of its keys is called unknown."""
    theirs: Any = transformers.GenerationConfig
    keys = theirs().to_dict()
    assert rules_of(tmp_path, dict.fromkeys(keys)) == GenerationRules()
    theirs(repetition_penalty=1.25).save_pretrained(tmp_path)
    assert rules_of(tmp_path, None).repetition_penalty == 1.25
    defaults = theirs._get_default_generation_params()
    defaults.pop("max_length")
    assert rules_of(tmp_path, defaults) == GenerationRules()


REFUSED: list[tuple[str, Any, str]] = [
    ("num_beams", 4, "num_beams = 4 is not implemented"),
    ("guidance_scale", 1.5, "guidance_scale"),
    ("forced_eos_token_id", 2, "forced_eos_token_id"),
    ("forced_bos_token_id", 0, "forced_bos_token_id"),
    ("sequence_bias", [[[3], 1.0]], "sequence_bias"),
    ("exponential_decay_length_penalty", [5, 1.1], "exponential_decay_length_penalty"),
    ("penalty_alpha", 0.6, "penalty_alpha"),
    ("chat_format", "chatml", "unknown keys: chat_format"),
    ("repetition_penalty", 0, "repetition_penalty = 0.0, expected a number above 0"),
    ("repetition_penalty", "1.1", "repetition_penalty = '1.1'"),
    ("no_repeat_ngram_size", -1, "no_repeat_ngram_size = -1"),
    ("suppress_tokens", ["a"], "suppress_tokens = ['a']"),
    ("bad_words_ids", [3], "bad_words_ids has 3"),
    ("bad_words_ids", [[1000]], "bad_words_ids has [1000]"),
    ("bad_words_ids", [[]], "bad_words_ids has []"),
    ("stop_strings", [1], "stop_strings = [1]"),
    ("do_sample", 1, "do_sample = 1"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: f"{c[0]}-{c[1]}")
def test_what_is_not_implemented_is_refused_by_name(
    case: tuple[str, Any, str], tmp_path: Path
) -> None:
    key, value, reason = case
    with pytest.raises(ConfigError) as refused:
        rules_of(tmp_path, {key: value})
    assert reason in refused.value.message
    assert "generation_config.json" in refused.value.message


def test_an_unknown_key_is_ignored_on_demand_only(tmp_path: Path) -> None:
    write(tmp_path, {"chat_format": "chatml", "num_beams": 2})
    with pytest.raises(ConfigError, match="num_beams = 2"):
        generation.read_rules(tmp_path, {}, 1000, ("chat_format", "num_beams"))
    write(tmp_path, {"chat_format": "chatml"})
    assert generation.read_rules(tmp_path, {}, 1000, ("chat_format",)) == GenerationRules()


def test_config_json_counts_where_there_is_no_other_file(tmp_path: Path) -> None:
    old = {"max_length": 20, "temperature": 1.0, "top_k": 50, "num_beams": 1}
    assert rules_of(tmp_path, None, **old) == GenerationRules()
    assert rules_of(tmp_path, None, repetition_penalty=1.2).repetition_penalty == 1.2
    assert rules_of(tmp_path, {}, repetition_penalty=1.2).repetition_penalty == 1.0
    with pytest.raises(ConfigError, match=r"config\.json: num_beams = 3"):
        (tmp_path / "generation_config.json").unlink()
        rules_of(tmp_path, None, num_beams=3)


@pytest.mark.parametrize("top", [None, 5, [6, 7]])
@pytest.mark.parametrize("text", [None, 8])
@pytest.mark.parametrize("own", ["absent", None, 9, [9, 10]])
def test_ends_come_in_the_order_of_transformers(
    top: Any, text: Any, own: Any, built: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(built[0], folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"], config["text_config"]["eos_token_id"] = top, text
    (folder / "config.json").write_text(json.dumps(config))
    if own != "absent":
        write(folder, {"eos_token_id": own})
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    theirs = model.generation_config.eos_token_id
    found = systems.load(folder, Options()).model.prompts.eos
    if theirs is not None:
        assert list(found) == (theirs if isinstance(theirs, list) else [theirs])
    else:  # transformers never ends; config.json may know better, and the tokenizer does
        stated = top if top is not None else text
        expected = [2] if stated is None else stated if isinstance(stated, list) else [stated]
        assert list(found) == expected


def test_the_tokenizer_names_the_end_where_nothing_else_does(tmp_path: Path) -> None:
    tokenizer = json.loads((HERE / "goldens/mlcd_llavanext_e2e/tokenizer.json").read_text())
    text, end = json.dumps(tokenizer), {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    assert generation.read_eos(tmp_path, {}, "qwen2", text) == ()
    for token in ("<|im_end|>", {"content": "<|im_end|>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        ids = generation.read_eos(tmp_path, {}, "qwen2", text)
        assert ids == (end["<|im_end|>"],)
    assert generation.read_eos(tmp_path, {"eos_token_id": 3}, "qwen2", text) == (3,)
    assert generation.read_eos(tmp_path, {}, "llama", text) == (2,)
    assert generation.read_eos(tmp_path, {"eos_token_id": None}, "llama", text) == ids
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    assert generation.read_eos(tmp_path, {}, "qwen2", text) == ()


# -- what users see ----------------------------------------------------------------------------


def test_rules_travel_from_the_checkpoint_to_the_engine(tmp_path: Path) -> None:
    golden = HERE / "goldens/e2e_llava15"
    shutil.copytree(golden, tmp_path / "golden")
    folder = tmp_path / "golden/llava-v1.5-tiny"
    write(folder, PUBLISHED["Qwen2.5-0.5B-Instruct"] | {"eos_token_id": 2, "bad_words_ids": [[5]]})
    engine = engine_of(folder, tmp_path)
    rules = systems.load(folder, Options()).model.generation
    assert manifest.read(engine).parsed_vlm().generation == rules
    line = "generation: repetition_penalty 1.1, bad_words_ids [[5]], do_sample true, "
    line += "temperature 0.7, top_k 20, top_p 0.8"
    for path in (folder, tmp_path / "bundle", engine):
        data, lines = api.inspect(path)
        assert [text for text in lines if text == line], path
        shown = data["model"]["generation"] if path == folder else data["generation"]
        assert shown["repetition_penalty"] == 1.1
