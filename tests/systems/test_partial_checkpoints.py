"""Folders with a part of a checkpoint: joined with their base, or named for what they are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import CheckpointError, ConfigError, ToolkitError
from edgevlm.training.torch_files import reader
from tests.pipeline import ask, engine_of
from tests.refusals import LM, TOWER, checkpoint_in, edgevlm
from tests.systems.test_huggingface import IMAGE, PROMPT, expected_ids, save

Tensors = dict[str, torch.Tensor]
TARGETS = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}
PLAIN: dict[str, Any] = {
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "lora_alpha": 16, "lora_dropout": 0.05,
    "modules_to_save": None, "peft_type": "LORA", "r": 4, "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}  # fmt: skip
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 4938985352\n"


def load(folder: Path, base: Path | None = None) -> Source:
    return systems.load(folder, Options(torch_reader=reader(), base=base))


def refusal(folder: Path, base: Path | None = None) -> tuple[str, str]:
    with pytest.raises(ToolkitError) as refused:
        load(folder, base)
    return refused.value.message, refused.value.hint


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.1


def pairs(base: Tensors, prefix: str = "base_model.model.") -> Tensors:
    """A LoRA pair for some linears of the base, under PEFT's names."""
    torch.manual_seed(1)
    found = {}
    for key, weight in base.items():
        if key.endswith(tuple(f"{name}.weight" for name in TARGETS)):
            stem = prefix + key.removesuffix(".weight")
            found[f"{stem}.lora_A.weight"] = drawn(4, weight.shape[1])
            found[f"{stem}.lora_B.weight"] = drawn(weight.shape[0], 4)
    assert found
    return found


def part(work: Path, name: str) -> tuple[Path, Tensors]:
    """A folder with the config.json of the base beside it, and the base's tensors."""
    base = checkpoint_in(work)
    folder = work / name
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    return folder, load_file(base / "model.safetensors")


def adapter(work: Path, **changes: Any) -> tuple[Path, Tensors, Tensors]:
    """A LoRA run's folder, the base's tensors, and the adapter's."""
    folder, tensors = part(work, "llava-lora")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    found = pairs(tensors)
    save_file(found, folder / "adapter_model.safetensors")
    return folder, tensors, found


def same_weights(found: Source, work: Path, tensors: Tensors) -> None:
    """The source has the weights of a whole folder with these tensors."""
    whole = work / "whole"
    shutil.copytree(work / LM, whole)
    save_file(tensors, whole / "model.safetensors")
    expected = load(whole)
    assert found.model.lm == expected.model.lm
    for component, weights in expected.weights.items():
        assert set(weights) == set(found.weights[component])
        for key in weights:
            np.testing.assert_allclose(found.weights[component][key], weights[key], atol=1e-6)


@pytest.mark.parametrize("rooted", [False, True])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_plain_adapter_is_merged(rooted: bool, file: str, tmp_path: Path) -> None:
    folder, tensors, lora = adapter(tmp_path, use_rslora=rooted)
    if file.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
        torch.save(lora, folder / file)
    torch.manual_seed(2)
    tuned = {key: drawn(*t.shape) for key, t in tensors.items() if "mm_projector" in key}
    torch.save({f"base_model.model.{key}": t for key, t in tuned.items()},
               folder / "non_lora_trainables.bin")  # fmt: skip
    scale = 16 / (math.sqrt(4) if rooted else 4)
    expected = {key: tensor.float() for key, tensor in (tensors | tuned).items()}
    for key in list(lora):
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            expected[name] += scale * lora[key.replace("_A.", "_B.")] @ lora[key]
    same_weights(load(folder, tmp_path / LM), tmp_path, expected)


def test_an_adapter_over_hugging_faces_layout_needs_no_config_of_its_own(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = save(base, "grouped heads")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN))
    text = {key: p for key, p in model.named_parameters() if "language_model" in key}
    lora = pairs(text)
    save_file(lora, folder / "adapter_model.safetensors")
    with torch.no_grad():
        for key, weight in text.items():
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in lora:
                weight += 4 * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
    expected = expected_ids(model, base, PROMPT, 12)
    merged = edgevlm("export", folder, tmp_path / "bundle", "--base", base, "-q")
    assert merged.code == 0, merged.err
    assert list(ask(engine_of(tmp_path / "bundle", tmp_path), PROMPT, [IMAGE], 12).token_ids) == (
        expected
    )


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.",
                                    "base_model.model.model.mm_projector."])  # fmt: skip
def test_a_projector_alone_is_joined_with_its_base(prefix: str, tmp_path: Path) -> None:
    folder, tensors = part(tmp_path, "llava-pretrain")
    tuned = {key: drawn(*t.shape) for key, t in tensors.items() if "mm_projector" in key}
    own = {prefix + key.removeprefix("model.mm_projector."): t for key, t in tuned.items()}
    torch.save(own, folder / "mm_projector.bin")
    same_weights(load(folder, tmp_path / LM), tmp_path, tensors | tuned)


# -- named for what they are -----------------------------------------------------------------------


def test_parts_without_their_base_are_named(tmp_path: Path) -> None:
    folder, *_ = adapter(tmp_path / "a")
    message, hint = refusal(folder)
    assert "a LoRA adapter without its base model ('lmsys/vicuna-7b-v1.5')" in message
    assert "--base" in hint
    (folder / "config.json").unlink()
    assert refusal(folder) == (message, hint)
    folder, _ = part(tmp_path / "b", "llava-pretrain")
    torch.save({"model.mm_projector.0.weight": torch.ones(2)}, folder / "mm_projector.bin")
    message, hint = refusal(folder)
    assert "a projector (mm_projector) without its language model" in message
    assert "--base" in hint


@pytest.mark.parametrize("name", [None, "", "lmsys/vicuna-13b-v1.5", "/data/models/vicuna-13b"])
@pytest.mark.parametrize("kind", ["adapter", "projector"])
def test_the_base_is_named_where_the_folder_names_it(
    kind: str, name: str | None, tmp_path: Path
) -> None:
    if kind == "adapter":
        folder, *_ = adapter(tmp_path, base_model_name_or_path=name)
        file = "adapter_config.json"
    else:
        folder, _ = part(tmp_path, "llava-pretrain")
        torch.save({"model.mm_projector.0.weight": torch.ones(2)}, folder / "mm_projector.bin")
        file = "config.json"
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": name}))
    message, hint = refusal(folder)
    assert message.endswith(f"({name!r})" if name else f"(which {file} does not name)")
    assert "--base BASE, with the folder or the model id of " in hint
    assert hint.endswith("that model" if name else "it was trained on")


MORE: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora = True"),
    ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
    ({"bias": "lora_only"}, "bias = 'lora_only'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"r": 0}, "r = 0"),
    ({"heads_pattern": 1}, "unknown keys: heads_pattern"),
]


@pytest.mark.parametrize(("change", "reason"), MORE)
def test_an_adapter_that_is_more_than_plain_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder, *_ = adapter(tmp_path, **change)
    assert reason in refusal(folder, tmp_path / LM)[0]


def changed(change: Callable[[Tensors], object]) -> Callable[[Path, Tensors], None]:
    def apply(folder: Path, lora: Tensors) -> None:
        change(lora)
        save_file(lora, folder / "adapter_model.safetensors")

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ODD: dict[str, tuple[Callable[[Path, Tensors], None], str]] = {
    "half a pair": (changed(lambda t: t.pop(f"{Q}.lora_B.weight")), "no pair of lora_A and lora_B"),
    "another tensor": (changed(lambda t: t.update(extra=torch.ones(2))), "extra is no pair"),
    "another rank": (
        changed(lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64, 5)})), "(64, 5)"
    ),
    "another width": (
        changed(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 9)})), "(4, 9)"
    ),
    "a module of another model": (
        changed(lambda t: t.update({f"{Q}z.lora_A.weight": torch.ones(4, 9),
                                    f"{Q}z.lora_B.weight": torch.ones(9, 4)})),
        "q_projz, which the base model does not have",
    ),
    "no tensors": (lambda f, t: (f / "adapter_model.safetensors").unlink(), "no adapter_model"),
}  # fmt: skip


@pytest.mark.parametrize("way", ODD)
def test_an_adapter_that_does_not_fit_is_refused(way: str, tmp_path: Path) -> None:
    folder, _, lora = adapter(tmp_path)
    ODD[way][0](folder, lora)
    message, hint = refusal(folder, tmp_path / LM)
    assert ODD[way][1] in message
    assert hint


def test_a_whole_checkpoint_takes_no_base(tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path)
    assert "--base is for a LoRA adapter" in refusal(folder, folder)[0]
    with pytest.raises(ConfigError, match="--base is for checkpoints"):
        systems.preset("llava-qwen2-0.5b", 0, Options(base=folder))


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "tokenizer.model", "tokenizer.json", "config.json"],
)
def test_pointers_of_git_lfs_are_named(name: str, tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(LFS)
    message, hint = refusal(folder)
    assert f"{name} ({len(LFS)} bytes) is a Git LFS pointer" in message
    assert f"git -C {folder} lfs pull" in hint


def test_a_pointer_in_the_towers_folder_is_named(tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path)
    (tmp_path / TOWER / "model.safetensors").write_text(LFS)
    message, hint = refusal(folder)
    assert "is a Git LFS pointer" in message
    assert f"{TOWER} lfs pull" in hint


@pytest.mark.parametrize("where", ["mm_projector", "layers.0", "embed_tokens"])
def test_placeholders_of_zero3_are_named(where: str, tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: torch.zeros(0) if where in k else t for k, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    message, hint = refusal(folder)
    assert "empty tensors, as DeepSpeed ZeRO-3 leaves them" in message
    assert "zero_to_fp32.py" in hint


QUANTIZED: list[tuple[dict[str, Any], str, str]] = [
    ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "", "'hqq'"),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "",
        "bitsand",
    ),
    ({}, "model.layers.0.self_attn.q_proj.qweight", "q_proj.qweight"),
    ({}, "model.layers.0.mlp.up_proj.weight.absmax", "absmax"),
]


@pytest.mark.parametrize(("change", "tensor", "reason"), QUANTIZED)
def test_weights_that_others_quantized_are_named(
    change: dict[str, Any], tensor: str, reason: str, tmp_path: Path
) -> None:
    folder = checkpoint_in(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    tensors = load_file(folder / "model.safetensors")
    if tensor:
        save_file(tensors | {tensor: torch.ones(2, dtype=torch.int32)},
                  folder / "model.safetensors")  # fmt: skip
    message, hint = refusal(folder)
    assert "another program quantized" in message
    assert reason in message
    assert "--precision" in hint


@pytest.mark.parametrize(
    ("name", "reason", "advice"),
    [
        ("global_step100", "DeepSpeed's partitions (global_step100)", "python zero_to_fp32.py ."),
        ("model.gguf", "does not read: model.gguf", "safetensors"),
        ("model-00001-of-00002.safetensors", "without their index", "incomplete"),
        ("notes.txt", "holds no weights", "incomplete"),
    ],
)
def test_a_folder_without_weights_is_named_for_what_it_has(
    name: str, reason: str, advice: str, tmp_path: Path
) -> None:
    folder = checkpoint_in(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    assert reason in refused.value.message
    assert advice in refused.value.hint
