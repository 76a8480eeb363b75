"""GPTQ and AWQ checkpoints of both layouts, from the folder to the answer, with their own codes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edgevlm.engines.build.build import Request, build
from edgevlm.engines.build.check import TOLERANCE
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.export import write
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import relative_difference
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.target import parse
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.vlm import cost
from edgevlm.training.torch_files import reader
from tests.packed import LAYERS, Kind, float_twin, quantize
from tests.pipeline import ask, engine_of, silent
from tests.refusals import IMAGE, checkpoint_in, edgevlm, edit, refuses
from tests.systems.test_huggingface import PROMPT, save
from tests.systems.test_same_answer import replayed

KINDS = {
    "gptq": Kind(),
    "gptq of 8 bits": Kind(bits=8, group=16),
    "gptq with zero points": Kind(symmetric=False, v2=True, group=16),
    "gptq by activations": Kind(desc_act=True, group=16),
    "awq": Kind("awq", group=16),
    "awq in one group": Kind("awq", group=-1),
}
_MODULES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
            "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
            "down": "mlp.down_proj"}  # fmt: skip


def original(work: Path) -> Path:
    """The tiny LLaVA-1.5: widths 64 and 144."""
    return checkpoint_in(work)


def huggingface(work: Path) -> Path:
    """A tiny LlavaForConditionalGeneration with Qwen2, whose q, k and v have biases."""
    save(work / "hf", "qwen2 untied")
    return work / "hf"


LAYOUTS = {"original": original, "huggingface": huggingface}


def has_zero_points(kind: Kind) -> bool:
    return kind.method == "awq" or not kind.symmetric


def theirs(key: str, expected: Mapping[str, Array]) -> Array | None:
    """The published weight [outputs, inputs] of one of our tensors."""
    match = re.fullmatch(r"layers\.(\d+)\.(?:attention|mlp)\.(\w+)\.weight", key)
    if match is None:
        return None
    end = f"layers.{match[1]}.{_MODULES[match[2]]}.weight"
    return next(x for name, x in expected.items() if name.endswith(end))


def logits(engine: Path) -> Array:
    """After a prompt with an image."""
    with Session.open(engine) as session:
        features = session.encode([decode.load(IMAGE)], Clock())
        prompt = prompts.tokenize(session.model.prompts, session.tokenizer, PROMPT)
        sequence = prompts.assemble(prompt, features.indices)
        return np.array(session.prefill(sequence, features.rows, session.new_state()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_bundle_and_engine_have_the_checkpoints_values(
    name: str, layout: str, tmp_path: Path
) -> None:
    folder = LAYOUTS[layout](tmp_path)
    expected = quantize(folder, KINDS[name])
    engine = engine_of(folder, tmp_path)
    bundle = Bundle.open(tmp_path / "bundle")
    tensors, packed = bundle.tensors("lm"), 0
    for key in tensors:
        published = theirs(key, expected)
        if published is not None:
            np.testing.assert_array_equal(tensors[key].T, published)
            packed += tensors.codes(key) is not None
    # Zero points of 4 bits come in pairs of blocks, of which 144 inputs have none.
    in_float = 2 if layout == "original" and has_zero_points(KINDS[name]) else 0
    assert (packed, len(expected)) == (14 - in_float, 14)

    # The rounded model is the model: a build compares kernels with it, and nothing else.
    for golden in goldens.load(bundle.path / "golden.npz"):
        for output, values in golden.outputs.items():
            assert relative_difference(values, golden.float_outputs[output]) < 1e-5
    twin = float_twin(folder, tmp_path / "twin", expected)
    (tmp_path / "floats").mkdir()
    exact = logits(engine_of(twin, tmp_path / "floats"))
    assert relative_difference(logits(engine), exact) < TOLERANCE["int8"]
    build(bundle.path, tmp_path / "r", Request(parse("reference"), None, False, "t"), silent)
    assert relative_difference(logits(tmp_path / "r"), exact) < TOLERANCE["fp32"]


@pytest.mark.parametrize("name", KINDS)
def test_the_portable_graph_reads_the_stored_bytes(name: str, tmp_path: Path) -> None:
    folder = huggingface(tmp_path)
    quantize(folder, KINDS[name])
    source = systems.load(folder, Options())
    write.write_bundle(source, tmp_path / "b", made_by="tests", progress=silent)
    bundle = Bundle.open(tmp_path / "b")
    for found, expected in replayed(bundle):
        assert relative_difference(found, expected) < TOLERANCE["fp32"]
    graph = onnx.load(str(tmp_path / "b/lm.onnx"), load_external_data=False).graph
    stored = {t.name for t in graph.initializer if t.data_location == t.EXTERNAL}
    zeros, order = ({n for n in stored if n.endswith(tail)} for tail in blockwise.TAILS[1:])
    assert bool(zeros) == has_zero_points(KINDS[name])
    assert bool(order) == KINDS[name].desc_act
    assert sum(n.op_type == "BlockedLinear" for n in graph.node) == 14
    file = SafetensorsFile(tmp_path / "b/lm.safetensors")
    counted = cost.stored_bytes(source.model, source.plan, 4)["lm"]
    assert counted == sum(entry.nbytes for entry in file.entries.values())


def test_floats_are_rounded_into_such_a_storage_as_into_the_plain_one(tmp_path: Path) -> None:
    folder, found = huggingface(tmp_path), []
    source = systems.load(folder, Options())
    for name, own in (("a", False), ("b", True)):
        plan = PrecisionPlan(rules=(Rule("lm/layers.*", "int4_weights", 16, own, own),))
        made = replace(source, plan=plan)
        write.write_bundle(made, tmp_path / name, made_by="tests", progress=silent)
        found.append(Bundle.open(tmp_path / name).tensors("lm"))
    for key in found[0]:
        np.testing.assert_array_equal(found[0][key], found[1][key])
    codes = found[1].codes("layers.0.mlp.up.weight")
    assert codes is not None
    assert codes.zero_points is not None
    assert codes.order is not None


@pytest.mark.parametrize("name", ["awq", "gptq by activations"])
def test_a_bundle_written_again_has_the_same_codes(name: str, tmp_path: Path) -> None:
    folder = huggingface(tmp_path)
    quantize(folder, KINDS[name])
    source = systems.load(folder, Options())
    write.write_bundle(source, tmp_path / "a", made_by="tests", progress=silent)
    again = systems.load(tmp_path / "a", Options())
    assert again.plan == source.plan
    write.write_bundle(again, tmp_path / "b", dtype="fp16", made_by="tests", progress=silent)
    first, second = (Bundle.open(tmp_path / n).tensors("lm") for n in "ab")
    for key in first:
        codes, others = first.codes(key), second.codes(key)
        if codes is not None and others is not None:
            np.testing.assert_array_equal(codes.codes, others.codes)
            np.testing.assert_array_equal(first[key], second[key])  # published scales are fp16


def test_modules_that_stay_in_float_are_float(tmp_path: Path) -> None:
    folder = huggingface(tmp_path)
    kind = replace(KINDS["awq"], changes={"modules_to_not_convert": ["down_proj", "k_proj"]})
    expected = quantize(folder, kind, LAYERS + "(q|v|o|gate|up)_proj.weight")
    plain = load_file(folder / "model.safetensors")
    engine_of(folder, tmp_path)
    tensors = Bundle.open(tmp_path / "bundle").tensors("lm")
    assert tensors.codes("layers.0.mlp.up.weight") is not None
    for ours, name in (("attention.k", "self_attn.k_proj"), ("mlp.down", "mlp.down_proj")):
        key = f"layers.1.{ours}.weight"
        assert tensors.codes(key) is None
        stored = next(x for n, x in plain.items() if n.endswith(f"layers.1.{name}.weight"))
        np.testing.assert_array_equal(tensors[key].T, stored)
    assert len(expected) == 10


def test_a_packed_output_layer(tmp_path: Path) -> None:
    folder = huggingface(tmp_path)
    edit(folder / "config.json", lambda c: c["text_config"].update(vocab_size=1008))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("lm_head.weight", "embed_tokens.weight")):
            tensors[name] = np.concatenate([tensor, tensor[:7]])
    save_file(tensors, folder / "model.safetensors")
    expected = quantize(folder, KINDS["gptq"], r".*(_proj|lm_head)\.weight")
    towers = [name for name in expected if "vision" in name]
    engine_of(folder, tmp_path)
    bundle = Bundle.open(tmp_path / "bundle")
    found = bundle.tensors("lm")
    assert found.codes("head.weight") is not None
    head = next(x for n, x in expected.items() if n.endswith("lm_head.weight"))
    np.testing.assert_array_equal(found["head.weight"].T, head)
    # towers keep the values, in float
    assert towers
    values = {x.tobytes() for x in expected.values()}
    tower = bundle.tensors("encoder.clip")
    kept = sum(np.ascontiguousarray(tower[k].T).tobytes() in values for k in tower)
    assert kept > 3
    assert bundle.manifest.source["quantization"] == "gptq, 4 bits, groups of 32"


def test_names_of_the_second_generation(tmp_path: Path) -> None:
    folder = huggingface(tmp_path)
    expected = quantize(folder, KINDS["awq"])
    tensors = load_file(folder / "model.safetensors")
    names = {"language_model.lm_head": "lm_head", "language_model.model.": "model.language_model."}
    renamed = {}
    for key, tensor in tensors.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed["model." * key.startswith(("vision_tower", "multi_modal")) + key] = tensor
    save_file(renamed, folder / "model.safetensors")
    source = systems.load(folder, Options())
    weights = source.weights["lm"]
    for key in weights:
        published = theirs(key, expected)
        if published is not None:
            np.testing.assert_array_equal(weights[key].T, published)
    assert source.plan.precisions == {"int4_weights"}


def test_torch_files_hold_the_same(tmp_path: Path) -> None:
    folder = original(tmp_path)
    expected = quantize(folder, KINDS["gptq by activations"])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({n: torch.from_numpy(x) for n, x in tensors.items()}, folder / "pytorch_model.bin")
    source = systems.load(folder, Options(torch_reader=reader()))
    for key, weight in source.weights["lm"].items():
        published = theirs(key, expected)
        if published is not None:
            np.testing.assert_array_equal(weight.T, published)
    assert source.plan.rules[0].ordered


def test_the_command_line_reads_them(tmp_path: Path) -> None:
    folder = huggingface(tmp_path)
    quantize(folder, KINDS["awq"])
    ran = edgevlm("inspect", folder)
    assert "int4_weights in lm/layers.*" in ran.out
    assert edgevlm("export", folder, tmp_path / "b").code == 0
    assert edgevlm("build", tmp_path / "b", tmp_path / "e").code == 0
    assert "int4_weights in lm/layers.*" in edgevlm("inspect", tmp_path / "e").out
    assert len(ask(tmp_path / "e", PROMPT, [IMAGE], 8).token_ids) == 8
    small = json.loads(edgevlm("inspect", folder, "--json").out)["components"][-1]["bytes"]
    weights = (tmp_path / "b/lm.safetensors").stat().st_size
    assert abs(small - weights) < 12_000  # the header of the file


REFUSED: dict[str, tuple[Kind, str]] = {
    "3 bits": (Kind(changes={"bits": 3}), "bits = '3'"),
    "2 bits": (Kind(changes={"bits": 2}), "bits = '2'"),
    "gemv": (Kind("awq", changes={"version": "gemv"}), "'gemv'"),
    "marlin": (Kind("awq", changes={"version": "marlin"}), "'marlin'"),
    "an unknown method": (Kind(changes={"quant_method": "hqq"}), "'hqq'"),
    "groups of another size": (Kind(changes={"group_size": 64}), "qzeros"),
    "a key that nobody knows": (Kind(changes={"rotation": "x"}), "rotation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_one_error(name: str, tmp_path: Path) -> None:
    kind, reason = REFUSED[name]
    folder = original(tmp_path)
    quantize(folder, kind)
    message, hint = refuses(tmp_path, "export", folder, tmp_path / "out")
    assert reason in message
    assert hint


def test_an_adapter_on_packed_weights_is_refused(tmp_path: Path) -> None:
    folder = original(tmp_path)
    quantize(folder, KINDS["gptq"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stated = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    message, hint = refuses(tmp_path, "export", adapter, tmp_path / "out", "--base", folder)
    assert "another program quantized: quantization_config names 'gptq'" in message
    assert "--precision int4" in hint


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    folder = original(tmp_path)
    quantize(folder, KINDS["gptq"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors")
    message, _ = refuses(tmp_path, "export", folder, tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.scales is missing" in message


def test_they_are_not_trained(tmp_path: Path) -> None:
    folder = original(tmp_path)
    quantize(folder, KINDS["gptq"])
    words = ["train", "llava-finetune", "--model", folder, "--data", tmp_path, "-o", tmp_path / "t"]
    message, hint = refuses(tmp_path, *words)
    assert "another program quantized (gptq, 4 bits, groups of 32)" in message
    assert "float checkpoint" in hint
