"""Checkpoints that do not fit together: refused with the value, and nothing is written."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.refusals import LM, TOWER, checkpoint_in, edgevlm, edit, refuses

Tensors = dict[str, np.ndarray[Any, Any]]
Q = "model.layers.0.self_attn.q_proj.weight"
BIG = 10**12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return checkpoint_in(tmp_path)


def export_refused(source: Path, *words: object) -> tuple[str, str]:
    """Error and hint of exporting `source`; its folder is as before, without a bundle."""
    return refuses(source.parent, "export", source, source.parent / "bundle", "--quiet", *words)


# -- weights -----------------------------------------------------------------------------------


def tensors(change: Callable[[Tensors], object], folder: str = LM) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        file = work / folder / "model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return damage


def bytes_of(change: Callable[[bytes], bytes], name: str = f"{LM}/model.safetensors") -> Any:
    def damage(work: Path) -> None:
        (work / name).write_bytes(change((work / name).read_bytes()))

    return damage


def header_of(change: Callable[[dict[str, Any]], object]) -> Any:
    def rewritten(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return bytes_of(rewritten)


def with_value(value: float, at: tuple[int, int] = (999, 63)) -> Any:
    """One weight of the embedding replaced, in a row that no golden reads."""

    def change(found: Tensors) -> None:
        upcast = found["model.embed_tokens.weight"].astype(np.float32)
        upcast[at] = value
        found["model.embed_tokens.weight"] = upcast

    return tensors(change)


NORM = "model.norm.weight"
WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (bytes_of(lambda b: b[:-1000]), "is not a complete safetensors file"),
    "header cut": (bytes_of(lambda b: b[:100]), "model.safetensors (100 bytes)"),
    "empty file": (bytes_of(lambda b: b""), "model.safetensors (0 bytes)"),
    "text": (bytes_of(lambda b: b"version https://git-lfs.github.com/spec/v1\n"), "(43 bytes)"),
    "endless header": (bytes_of(lambda b: struct.pack("<Q", 1 << 60) + b[8:]), "not a complete"),
    "huge shape": (header_of(lambda h: h[Q].update(shape=[BIG, BIG])), "not a complete"),
    "unknown dtype": (header_of(lambda h: h[Q].update(dtype="F4")), "not a complete"),
    "missing": (tensors(lambda t: t.pop(Q)), f"1 missing: {Q}"),
    "missing in the tower": (
        tensors(lambda t: t.pop("vision_model.embeddings.class_embedding"), TOWER),
        "vision_model.embeddings.class_embedding",
    ),
    "extra": (tensors(lambda t: t.update(lora=np.zeros(3))), "1 unexpected: lora"),
    "mis-shaped": (
        tensors(lambda t: t.update({NORM: t[NORM][:-1]})),
        f"{NORM} is (63,), expected (64,)",
    ),
    "another rank": (tensors(lambda t: t.update({Q: t[Q][None]})), f"{Q} is (1, 64, 64)"),
    "integers": (tensors(lambda t: t.update({Q: t[Q].astype(np.int32)})), f"{Q} is stored as int"),
    "bytes": (tensors(lambda t: t.update({Q: t[Q].astype(np.uint8)})), f"{Q} is stored as uint8"),
    "NaN": (with_value(np.nan), "model.embed_tokens.weight holds NaN or infinite values"),
    "infinite": (with_value(-np.inf), "model.embed_tokens.weight holds NaN"),
    "NaN in the tower": (
        tensors(lambda t: t["vision_model.embeddings.class_embedding"].fill(np.nan), TOWER),
        "vision_model.embeddings.class_embedding holds NaN",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_damaged_weights_are_refused(case: str, source: Path) -> None:
    damage, reason = WEIGHTS[case]
    damage(source.parent)
    error, hint = export_refused(source)
    assert reason in error
    assert hint


def test_a_weight_beyond_half_precision_is_refused(source: Path) -> None:
    with_value(1e5)(source.parent)
    error, hint = export_refused(source, "--dtype", "fp16")
    assert "embed.weight holds 100000, which does not fit fp16" in error
    assert "bf16" in hint
    assert edgevlm("export", source, source.parent / "bf16", "--dtype", "bf16").code == 0


def every_shape(folder: str) -> list[str]:
    return sorted(load_file(checkpoint_file(folder)))


def checkpoint_file(folder: str) -> Path:
    from tests.refusals import GOLDEN

    return GOLDEN / folder / "model.safetensors"


@pytest.mark.parametrize("folder", [LM, TOWER])
def test_every_tensor_of_another_shape_is_refused(folder: str, source: Path) -> None:
    whole = load_file(checkpoint_file(folder))
    for name in sorted(whole):
        if name.endswith("position_ids") or ".post_layernorm." in name or ".layers.3." in name:
            continue  # not read: the select layer is before them
        wrong = np.concatenate([whole[name], whole[name][:1]])
        save_file({**whole, name: wrong}, source.parent / folder / "model.safetensors")
        assert name in export_refused(source, "--dry-run")[0]


INDEX = "model.safetensors.index.json"
INDEXES: dict[str, tuple[str, str]] = {
    "no JSON": ("{", f"{INDEX} is not valid JSON"),
    "no object": ("[]", "holds a JSON list"),
    "no map": ("{}", "has no weight_map"),
    "numbers": ('{"weight_map": {"a": 1}}', "has no weight_map"),
    "missing shard": ('{"weight_map": {"a": "one.safetensors"}}', "do not exist: one.safetensors"),
    "tensor in no shard": (
        '{"weight_map": {"a": "part.safetensors"}}',
        "a is not in part.safetensors",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_wrong_index_is_refused(case: str, source: Path) -> None:
    text, reason = INDEXES[case]
    stored = load_file(source / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, source / "part.safetensors")
    (source / "model.safetensors").unlink()
    (source / INDEX).write_text(text)
    assert reason in export_refused(source)[0]


class Code:
    """Unpickling this runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("way", ["torch", "pickle", "list", "empty", "not tensors"])
def test_pickled_code_is_never_run(way: str, source: Path) -> None:
    trace, file = source.parent / "was-here", source / "pytorch_model.bin"
    (source / "model.safetensors").unlink()
    if way == "torch":
        torch.save({Q: Code(trace)}, file)
    elif way == "pickle":
        file.write_bytes(pickle.dumps({Q: Code(trace)}))
    elif way == "empty":
        file.write_bytes(b"")
    else:
        torch.save([torch.zeros(2)] if way == "list" else {Q: 3}, file)
    error, hint = export_refused(source)
    assert str(file) in error
    assert hint
    assert not trace.exists()


# -- configurations ----------------------------------------------------------------------------


JSON_FILES = {
    "config.json": LM,
    "generation_config.json": LM,
    "tokenizer_config.json": LM,
    "preprocessor_config.json": TOWER,
}
BROKEN = {
    "cut": b'{"a": ',
    "latin-1": b'{"a": "\xe9\xff"}',
    "a list": b"[1]",
    "empty": b"",
    "deep": b"[" * 100_000,
    "digits": b'{"a": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("way", BROKEN)
@pytest.mark.parametrize("name", [*JSON_FILES, "tower's config.json", "tokenizer.json"])
def test_broken_json_is_refused(name: str, way: str, source: Path) -> None:
    folder = TOWER if "tower" in name else JSON_FILES.get(name, LM)
    file = source.parent / folder / name.removeprefix("tower's ")
    if name == "tokenizer.json":
        (source / "tokenizer.model").unlink()
    file.write_bytes(BROKEN[way])
    assert str(file) in export_refused(source)[0]


CONFIGS: list[tuple[str, str, Any, str]] = [
    (LM, "hidden_act", "gelu_new", "hidden_act = 'gelu_new' is not implemented"),
    (TOWER, "hidden_act", "swish", "hidden_act = 'swish' is not implemented"),
    (LM, "mm_projector_type", "mlp2x_relu", "mm_projector_type = 'mlp2x_relu'"),
    (LM, "hidden_size", "64", "hidden_size = '64', expected int"),
    (LM, "hidden_size", -64, "hidden_size = -64"),
    (LM, "hidden_size", 128, "mis-shaped"),
    (LM, "num_attention_heads", 0, "num_attention_heads = 0"),
    (LM, "num_attention_heads", 3, "num_attention_heads = 3 does not divide 64"),
    (LM, "num_key_value_heads", 3, "num_key_value_heads = 3 does not divide 4"),
    (LM, "num_attention_heads", 64, "heads of 1 channels"),
    (LM, "num_hidden_layers", 3, "missing: model.layers.2"),
    (LM, "num_hidden_layers", 1, "unexpected: model.layers.1"),
    (LM, "num_hidden_layers", 10**6, "num_hidden_layers = 1000000, expected 1 to 4096"),
    (LM, "vocab_size", 0, "vocab_size = 0"),
    (LM, "max_position_embeddings", 3, "max_position_embeddings 3 is less than 7"),
    (LM, "rms_norm_eps", -1.0, "rms_norm_eps = -1.0"),
    (LM, "rope_theta", 0, "rope_theta = 0.0"),
    (LM, "vocab_size", 10**15, "mis-shaped"),
    (LM, "max_position_embeddings", -1, "max_position_embeddings = -1"),
    (LM, "rms_norm_eps", float("nan"), "rms_norm_eps = nan"),
    (LM, "rope_theta", float("inf"), "rope_theta = inf"),
    (LM, "rope_scaling", {"type": "yarn", "factor": 2.0}, "'yarn' is not implemented"),
    (LM, "rope_scaling", "linear", "rope_scaling = 'linear'"),
    (LM, "model_type", ["llava_llama"], "model_type = ['llava_llama']"),
    (LM, "model_type", "llava_gemma", "model_type 'llava_gemma'"),
    (LM, "mm_hidden_size", 1024, "mm_hidden_size = 1024, the tower gives 48"),
    (LM, "mm_vision_select_layer", -9, "select layer -9 does not exist"),
    (LM, "mm_vision_select_layer", "last", "mm_vision_select_layer = 'last'"),
    (LM, "mm_vision_tower", "nowhere/tower", "the vision tower 'nowhere/tower'"),
    (LM, "mm_vision_tower", 7, "mm_vision_tower = 7, expected the name"),
    (LM, "mm_vision_tower", None, "mm_vision_tower = None, expected the name"),
    (LM, "mm_vision_tower", "", "mm_vision_tower = '', expected the name"),
    (LM, "mm_vision_tower", ["a/b"], "mm_vision_tower = ['a/b'], expected the name"),
    (LM, "mm_vision_tower", "mobileclip_l_1024", "'mobileclip_l_1024' is MobileCLIP"),
    (LM, "image_aspect_ratio", "stretch", "image_aspect_ratio = 'stretch'"),
    (LM, "eos_token_id", "</s>", "eos_token_id = '</s>'"),
    *(
        (LM, key, None, f"{key} is null")
        for key in (
            "hidden_size",
            "num_attention_heads",
            "mm_hidden_size",
            "rms_norm_eps",
            "hidden_act",
            "vocab_size",
            "mm_vision_select_feature",
        )
    ),
    (TOWER, "image_size", None, "image_size is null"),
    (TOWER, "hidden_act", None, "hidden_act is null"),
    (LM, "rope_scaling", {"type": "linear", "factor": None}, "rope_scaling: factor is null"),
    (LM, "mm_projector_type", None, "mm_projector_type = None names no projector"),
    (LM, "mm_projector_type", "", "mm_projector_type = '' names no projector"),
    (LM, "mm_vision_select_layer", [], "mm_vision_select_layer = []"),
    (LM, "layer_types", 3, "layer_types = 3, expected list"),
    (LM, "sparse_attention", True, "unknown keys: sparse_attention"),
    (TOWER, "num_attention_heads", 5, "num_attention_heads = 5 does not divide 48"),
    (TOWER, "image_size", 336, "the tower takes (336, 336)"),
    (TOWER, "num_hidden_layers", "four", "num_hidden_layers = 'four'"),
    (TOWER, "patch_size", 0, "patch_size = 0"),
    (TOWER, "model_type", "eva_vision", "model_type = 'eva_vision'"),
]


@pytest.mark.parametrize("case", CONFIGS, ids=lambda c: f"{c[0][:5]}-{c[1]}-{c[2]}")
def test_a_configuration_that_is_not_implemented_is_refused(
    case: tuple[str, str, Any, str], source: Path
) -> None:
    folder, key, value, reason = case
    edit(source.parent / folder / "config.json", lambda c: c.update({key: value}))
    if key == "eos_token_id":
        (source / "generation_config.json").unlink()
    error, _ = export_refused(source)
    assert reason in error


@pytest.mark.parametrize("value", [None, [], 5, "x", [[56]], [["a", "b"]], [[0, 56]]])
def test_pinpoints_that_are_none_are_refused(value: Any, source: Path) -> None:
    change = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": value}
    edit(source / "config.json", lambda c: c.update(change))
    assert "image_grid_pinpoints = " in export_refused(source)[0]


PIXELS: list[tuple[str, Any, str]] = [
    ("size", {"shortest_edge": "84"}, "'84'"),
    ("size", {"shortest_edge": -84}, "-84"),
    ("size", {"longest_edge": 84}, "longest_edge"),
    ("crop_size", {"height": 84, "width": 0}, "a side of 0"),
    ("crop_size", 10**9, "1000000000"),
    ("image_mean", ["a", "b", "c"], "image_mean = ['a', 'b', 'c']"),
    ("image_std", [0.2, 0.2, 0.0], "image_std = [0.2, 0.2, 0.0]"),
    ("image_std", -0.5, "image_std = -0.5"),
    ("image_std", [0.2, 0.2], "image_std = [0.2, 0.2]"),
    ("do_center_crop", False, "depends on the image"),
    ("resample", 6, "resample = 6"),
    ("image_processor_type", "PixtralImageProcessor", "'PixtralImageProcessor'"),
]


@pytest.mark.parametrize("case", PIXELS, ids=lambda c: f"{c[0]}-{c[1]}")
def test_preprocessing_that_is_not_implemented_is_refused(
    case: tuple[str, Any, str], source: Path
) -> None:
    key, value, reason = case
    file = source.parent / TOWER / "preprocessor_config.json"
    edit(file, lambda c: c.update({key: value}))
    assert reason in export_refused(source)[0]


@pytest.mark.parametrize("odd", ["text", {"one": "<s>"}, {"1": {"special": True}}, [1]])
def test_added_tokens_that_are_none_are_refused(odd: Any, source: Path) -> None:
    edit(source / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=odd))
    assert "tokenizer_config.json: added_tokens_decoder" in export_refused(source)[0]


# -- the tokenizer and the tower ---------------------------------------------------------------


def test_a_tokenizer_that_does_not_match_is_refused(source: Path) -> None:
    (source / "tokenizer.model").unlink()
    edit(source / "tokenizer.json", lambda t: t["model"]["vocab"].update(beyond=5000))
    error, hint = export_refused(source)
    assert "ids up to 5000, the model has 1000 rows" in error
    assert "another model" in hint
    edit(source / "tokenizer.json", lambda t: t.update(model={"type": "Unheard"}))
    assert "tokenizer" in export_refused(source)[0]
    (source / "tokenizer.json").write_text('{"added_tokens": 3}')
    assert "tokenizer" in export_refused(source)[0]
    (source / "tokenizer.json").unlink()
    assert "has no tokenizer" in export_refused(source)[0]
    (source / "tokenizer.model").write_bytes(b"not a model")
    assert "tokenizer.model is not a sentencepiece model" in export_refused(source)[0]


def test_a_missing_tower_is_refused(source: Path) -> None:
    file = source.parent / "tower.txt"
    file.write_text("a file where a folder should be")
    missing = source.parent / "nowhere"
    assert str(missing) in export_refused(source, "--vision-tower", missing)[0]
    assert str(file) in export_refused(source, "--vision-tower", file)[0]
    assert str(source) in export_refused(source, "--vision-tower", source)[0]
    shutil.move(source.parent / TOWER, source.parent / "elsewhere")
    error, hint = export_refused(source)
    assert "./clip-vit-tiny" in error
    assert "--vision-tower" in hint
    assert edgevlm(
        "export", source, source.parent / "b", "--vision-tower", source.parent / "elsewhere"
    ).code == 0  # fmt: skip


OPTIONS: list[tuple[tuple[str, ...], str]] = [
    (("--dtype", "int4"), "int4"),
    (("--system", "llava-one"), "llava-one"),
    (("--max-context", "0"), "--max-context 0"),
    (("--max-context", "6"), "--max-context 6"),
    (("--max-context", "-5"), "--max-context -5"),
    (("--max-context", "999999"), "--max-context 999999"),
    (("--for", "jetson-nano-2"), "jetson-nano-2"),
]


@pytest.mark.parametrize("case", OPTIONS, ids=lambda c: " ".join(c[0]))
def test_an_option_without_meaning_is_refused(case: tuple[tuple[str, ...], str]) -> None:
    from tests.refusals import GOLDEN

    words, reason = case
    assert reason in refuses(GOLDEN, "export", GOLDEN / LM, GOLDEN / "never", "-q", *words)[0]


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for source in (tmp_path / "nothing", file, tmp_path, "preset:llava-9", "no/model", "a\nb"):
        words = ["--random-weights"] if str(source).startswith("preset") else ["--offline"]
        error, _ = refuses(tmp_path, "export", source, tmp_path / "never", *words)
        assert " ".join(str(source).removeprefix("preset:").splitlines()) in error
    assert "--random-weights" in refuses(tmp_path, "export", "preset:llava-1.5-7b", "never")[1]
