"""Every kind of tokenizer file that checkpoints have: ids and flags are those of transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.layouts.tokenizer_files import (
    add_tokens,
    check_tokenizer,
    read_tokenizer,
)
from edgevlm.toolkit.errors import CheckpointError, ConfigError, InputError
from edgevlm.toolkit.text.tokenizer import Tokenizer, token_of
from tests.conftest import HERE
from tests.pipeline import ask, engine_of
from tests.systems import test_huggingface as facing
from tests.toolkit.text.test_sentencepiece_settings import proto

LLAMA = HERE / "goldens/e2e_llava15/llava-v1.5-tiny"
QWEN = HERE / "goldens/mlcd_llavanext_e2e"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TEXTS = [
    "", "a", " a <x> b<x>c ", "USER: What is in the image? ASSISTANT:", "<x>\n<x>", "a<x> </s>b",
    "你好 🙂\n\n  it's  1234", "a<x>b <xx> c<y>", "<|im_start|>user\nHi<|im_end|>\n", "e\u0301 ﬁ",
]  # fmt: skip


def edit(path: Path, *drop: str, **changes: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in data.items() if k not in drop} | changes))


def token(content: str = "<x>", **flags: Any) -> dict[str, Any]:
    return {"content": content, **FLAGS, "special": True, **flags}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden Llama tokenizer as a fast one: tokenizer.json and tokenizer_config.json."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return folder


def declare(folder: Path, **tokens: dict[str, Any]) -> None:
    """Adds to added_tokens_decoder; the names are ids after an underscore."""
    path = folder / "tokenizer_config.json"
    decoder = json.loads(path.read_text())["added_tokens_decoder"]
    more = {name.removeprefix("_"): entry for name, entry in tokens.items()}
    edit(path, added_tokens_decoder=decoder | more)


def in_file(folder: Path, *entries: dict[str, Any]) -> None:
    """Adds to the added tokens of tokenizer.json."""
    path = folder / "tokenizer.json"
    edit(path, added_tokens=[*json.loads(path.read_text())["added_tokens"], *entries])


def opened(folder: Path, *, slow: bool = False) -> Tokenizer:
    return Tokenizer.from_text(*read_tokenizer(folder, slow=slow))


def agree(folder: Path) -> Any:
    """Ids, decoded text and special tokens are those of transformers, which is returned."""
    witness = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = opened(folder)
    for text in TEXTS:
        ids = witness(text)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        expected = witness.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == expected
    return witness


# -- tokenizer.json ----------------------------------------------------------------------------

TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<unk>",
}


@pytest.mark.parametrize("left", [{"truncation": TRUNCATION}, {"padding": PADDING}])
def test_what_training_leaves_in_the_file_is_turned_off(left: dict[str, Any], folder: Path) -> None:
    edit(folder / "tokenizer.json", **left)
    agree(folder)
    assert len(opened(folder).encode(TEXTS[3])) > 4


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_the_post_processor_of_the_file_decides_about_bos(
    flag: bool, cut: bool, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    facing.save(checkpoint, "grouped heads")
    edit(checkpoint / "tokenizer_config.json", add_bos_token=flag)
    if cut:
        edit(checkpoint / "tokenizer.json", post_processor=None)
    agree(checkpoint)


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"special": False},
        {"lstrip": True},
        {"rstrip": True, "special": False},
        {"single_word": True},
        {"normalized": True, "special": False},
    ],
)
def test_added_tokens_decoder_holds(flags: dict[str, Any], missing: bool, folder: Path) -> None:
    if not missing:
        in_file(folder, {"id": 1000, **token(special=not flags.get("special", True))})
    declare(folder, _1000=token(**flags))
    witness = agree(folder)
    assert witness.convert_tokens_to_ids("<x>") == opened(folder).id_of("<x>") == 1000


def test_a_slow_tokenizer_takes_the_declared_flags_alone(folder: Path) -> None:
    in_file(folder, {"id": 1000, **token()})
    declare(folder, _1000=token(special=False))
    assert opened(folder, slow=True).decode([1000]) == "<x>"
    assert opened(folder, slow=False).decode([1000]) == ""


def test_tokens_of_the_older_files(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", "added_tokens_decoder")
    edit(folder / "added_tokens.json", **{"<x>": 1000, "<y>": 1001, "<xx>": 1002})
    edit(folder / "special_tokens_map.json", pad_token={"content": "<y>", **FLAGS})
    agree(folder)
    kept = opened(folder).decode([1000, 1001, 1002])
    assert ("<x>" in kept, "<y>" in kept, "<xx>" in kept) == (True, False, True)


@pytest.mark.parametrize("decoder", [{}, {"2": token("</s>")}])
def test_added_tokens_json_counts_only_without_the_newer_key(
    decoder: dict[str, Any], folder: Path
) -> None:
    edit(folder / "added_tokens.json", **{"<x>": 1000})
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    agree(folder)
    assert opened(folder).id_of("<x>") is None
    with pytest.raises(ConfigError, match="no token with the id 1000"):
        token_of(read_tokenizer(folder, slow=False)[0], 1000)


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("stated", ["<s>", None, "<unk>"])
@pytest.mark.parametrize("older", ["</s>", {"content": "</s>", **FLAGS}, None])
def test_the_named_bos_of_a_sentencepiece_model(
    older: Any, stated: Any, decoder: bool, tmp_path: Path
) -> None:
    """special_tokens_map.json comes first without added_tokens_decoder; null means none."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, tmp_path)
    drop = () if decoder else ("added_tokens_decoder",)
    edit(tmp_path / "tokenizer_config.json", *drop, bos_token=stated)
    edit(tmp_path / "special_tokens_map.json", **({"bos_token": older} if older else {}))
    expected = transformers.LlamaTokenizer.from_pretrained(tmp_path)("a")["input_ids"]
    for slow in (True, False):
        assert opened(tmp_path, slow=slow).encode("a") == expected


def test_the_file_of_the_tokenizer_wins_over_added_tokens_json(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", "added_tokens_decoder")
    in_file(folder, {"id": 1000, **token(lstrip=True)})
    edit(folder / "added_tokens.json", **{"<x>": 1000})
    agree(folder)
    assert "<x>" not in opened(folder).decode([1000])


@pytest.mark.parametrize(
    "stated",
    [
        {"pad_token": "<x>"},
        {"extra_special_tokens": {"image_token": "<x>"}},
        {"additional_special_tokens": ["<x>", "<y>"]},
        {"additional_special_tokens": [{"__type": "AddedToken", **token("<y>", rstrip=True)}]},
    ],
)
def test_special_tokens_that_are_only_named(stated: dict[str, Any], folder: Path) -> None:
    edit(folder / "tokenizer_config.json", **stated)
    agree(folder)


@pytest.mark.parametrize("number", [300, 1005])
def test_ids_that_contradict_are_refused(number: int, folder: Path) -> None:
    declare(folder, **{f"_{number}": token()})
    with pytest.raises(ConfigError, match=f"'<x>' the id {number}.*it has 1000"):
        read_tokenizer(folder, slow=False)
    in_file(folder, {"id": 1000, **token()})
    with pytest.raises(ConfigError, match=f"'<x>' the id {number}.*it has 1000"):
        read_tokenizer(folder, slow=True)


def test_slow_tokenizers_keep_ids_behind_a_gap(folder: Path) -> None:
    declare(folder, _1005=token(), _1003=token("<y>"))
    tokenizer = opened(folder, slow=True)
    assert (tokenizer.id_of("<x>"), tokenizer.id_of("<y>")) == (1005, 1003)
    assert tokenizer.encode("a<x>")[-1] == 1005


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("added_tokens.json", {"<x>": "1000"}),
        ("tokenizer_config.json", {"pad_token": 3}),
        ("special_tokens_map.json", {"pad_token": {"content": "<x>", "lstrip": "no"}}),
        ("special_tokens_map.json", {"additional_special_tokens": "<x>"}),
    ],
)
def test_tokens_that_cannot_be_read_are_refused(
    name: str, odd: dict[str, Any], folder: Path
) -> None:
    edit(folder / "tokenizer_config.json", "added_tokens_decoder")
    edit(folder / name, **odd)
    with pytest.raises(ConfigError, match=name):
        read_tokenizer(folder, slow=False)


# -- vocab.json and merges.txt -----------------------------------------------------------------


@pytest.fixture
def bytewise(tmp_path: Path) -> Path:
    """Qwen's tokenizer as its slow class saves it."""
    folder = tmp_path / "slow"
    folder.mkdir()
    for name in ("tokenizer_config.json", "merges.txt", "added_tokens.json"):
        shutil.copy(QWEN / name, folder)
    model = json.loads((QWEN / "tokenizer.json").read_text())["model"]
    known = {t: n for t, n in model["vocab"].items() if not t.startswith("<|")}
    (folder / "vocab.json").write_text(json.dumps(known))
    return folder


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("prefix", [False, True])
def test_vocabulary_and_merges(name: str, prefix: bool, bytewise: Path) -> None:
    settings = bytewise / "tokenizer_config.json"
    edit(settings, tokenizer_class=name, add_prefix_space=prefix)
    if name == "GPT2Tokenizer":
        edit(settings, bos_token="<|endoftext|>")
    witness = agree(bytewise)
    assert type(witness).__name__.removesuffix("Fast") in ("Qwen2Tokenizer", "GPT2Tokenizer")
    assert opened(bytewise).id_of("<|im_end|>") == 999


def test_they_say_what_tokenizer_json_said(bytewise: Path) -> None:
    whole = opened(QWEN, slow=True)
    for text in TEXTS:
        assert opened(bytewise, slow=True).encode(text) == whole.encode(text)


def test_tokens_of_added_tokens_json_beside_them(bytewise: Path) -> None:
    edit(bytewise / "tokenizer_config.json", "added_tokens_decoder")
    agree(bytewise)
    assert opened(bytewise).decode([998, 999]) == ""


def test_the_golden_loads_the_same_without_tokenizer_json(bytewise: Path) -> None:
    whole = bytewise.parent / "checkpoint"
    shutil.copytree(QWEN, whole)
    (whole / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bytewise / name, whole)
    found, expected = (systems.load(f, Options()).model for f in (whole, QWEN))
    assert replace(found, name=expected.name) == expected


def test_other_byte_level_files_are_refused(bytewise: Path) -> None:
    edit(bytewise / "tokenizer_config.json", tokenizer_class="RobertaTokenizer")
    with pytest.raises(ConfigError, match="tokenizer_class = 'RobertaTokenizer'"):
        read_tokenizer(bytewise, slow=True)
    edit(bytewise / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    (bytewise / "merges.txt").write_text("#version: 0.2\na b\na b c\n")
    with pytest.raises(ConfigError, match=r"merges\.txt: 'a b c'"):
        read_tokenizer(bytewise, slow=True)
    (bytewise / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.json with merges\.txt"):
        read_tokenizer(bytewise, slow=True)


# -- tokenizer.model ---------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_fast_systems_read_a_sentencepiece_model_too(legacy: bool, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    shutil.copy(LLAMA / "tokenizer.model", folder)
    edit(folder / "tokenizer_config.json", legacy=legacy, tokenizer_class="LlamaTokenizer")
    declare(folder, _1000=token("<x>", special=False))
    text, rules = read_tokenizer(folder, slow=False)
    assert rules is None
    ids = Tokenizer.from_text(text).encode("USER: a<x>b</s> c")
    slow = opened(folder, slow=True).encode("USER: a<x>b</s> c")
    assert ids == slow
    assert (1000 in ids, 2 in ids) == (True, True)


@pytest.mark.parametrize("way", ["user symbols", "nfkc", "extra blanks removed"])
def test_fast_systems_refuse_what_they_cannot_express(way: str, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(proto(way))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: .* for fast tokenizers"):
        read_tokenizer(folder, slow=False)
    assert opened(folder, slow=True).size == 400


# -- rows --------------------------------------------------------------------------------------


def test_the_vocabulary_needs_rows_and_so_do_the_marks_of_images(folder: Path) -> None:
    text, _ = read_tokenizer(folder, slow=True)
    assert check_tokenizer(text, 1000, "here") == 1000
    assert check_tokenizer(text, 1200, "here") == 1000
    with pytest.raises(CheckpointError, match="ids up to 999, the model has 999 rows"):
        check_tokenizer(text, 999, "here")
    marked = add_tokens(text, ["<im_patch>", "<im_start>", "<im_end>"])
    assert check_tokenizer(marked, 1001, "here") == 1001
    assert check_tokenizer(marked, 1003, "here", ["<im_start>", "<im_end>"]) == 1003
    with pytest.raises(CheckpointError, match="no row for <im_end>"):
        check_tokenizer(marked, 1002, "here", ["<im_start>", "<im_end>"])


def test_the_loader_adds_a_token_of_the_vocabulary_under_its_id(folder: Path) -> None:
    text, _ = read_tokenizer(folder, slow=True)
    tokenizer = Tokenizer.from_text(add_tokens(text, ["\u2581the", "<x>"]))
    assert (tokenizer.id_of("\u2581the"), tokenizer.id_of("<x>"), tokenizer.size) == (
        270,
        1000,
        1001,
    )
    assert tokenizer.decode([1000]) == ""


# -- the original layout -----------------------------------------------------------------------


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The golden LLaVA 1.5 with its tower beside it: 1000 rows, 1000 ids."""
    shutil.copytree(LLAMA, tmp_path / LLAMA.name)
    shutil.copytree(LLAMA.parent / "clip-vit-tiny", tmp_path / "clip-vit-tiny")
    return tmp_path / LLAMA.name


def test_an_original_with_more_tokens_than_rows_answers(original: Path, tmp_path: Path) -> None:
    prompt = "USER: <image>\nWhat is in the image? ASSISTANT:"
    (tmp_path / "before").mkdir()
    before = ask(engine_of(original, tmp_path / "before"), prompt, [facing.IMAGE], 8)
    edit(original / "tokenizer_config.json", pad_token="[PAD]")  # as Vicuna's first versions
    edit(original / "config.json", mm_use_im_patch_token=True)
    engine = engine_of(original, tmp_path)
    assert ask(engine, prompt, [facing.IMAGE], 8).token_ids == before.token_ids
    for token, number in (("[PAD]", 1000), ("<im_patch>", 1001)):
        with pytest.raises(InputError, match=rf"no embedding for \(id {number} of 1000 rows\)"):
            ask(engine, f"USER: {token} ASSISTANT:", [], 8)


def test_an_original_without_rows_for_its_image_marks_is_refused(original: Path) -> None:
    edit(original / "config.json", mm_use_im_start_end=True)
    with pytest.raises(CheckpointError, match="no row for <im_start>"):
        systems.load(original, Options())


@pytest.mark.parametrize("older", [True, False])
def test_an_original_whose_tokenizer_json_lacks_its_marks(older: bool, tmp_path: Path) -> None:
    whole = tmp_path / "checkpoint"
    shutil.copytree(QWEN, whole)
    data = json.loads((whole / "tokenizer.json").read_text())
    vocab = {t: n for t, n in data["model"]["vocab"].items() if not t.startswith("<|")}
    edit(whole / "tokenizer.json", added_tokens=[], model=data["model"] | {"vocab": vocab})
    if older:
        edit(whole / "tokenizer_config.json", "added_tokens_decoder")
    else:
        (whole / "added_tokens.json").unlink()
    for text in TEXTS:
        assert opened(whole, slow=True).encode(text) == opened(QWEN, slow=True).encode(text)
    assert opened(whole, slow=True).decode([997, 998, 999]) == ""


def test_a_token_behind_every_piece_is_refused(folder: Path) -> None:
    processor = json.loads((folder / "tokenizer.json").read_text())["post_processor"]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    tokens = processor["special_tokens"] | {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}
    changed = processor | {"single": [*processor["single"], end], "special_tokens": tokens}
    edit(folder / "tokenizer.json", post_processor=changed)
    agree(folder)
    with pytest.raises(ConfigError, match="post_processor ends every text with a token"):
        read_tokenizer(folder, slow=True)
