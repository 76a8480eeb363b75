"""`python -m benchmarks.compare_peers.make_gguf COMMAND ...`: llama.cpp's files.

`projector CHECKPOINT OUT f16|f32` writes the vision tower and the merger, `lm SOURCE LM OUT` the
language model in float32 with llama.cpp's own converter (SOURCE: the folder of its sources; its
gguf-py on PYTHONPATH), `quantize IN OUT Q8_0|Q4_0` calls llama.cpp's library.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# Parts of tensor names, from transformers' to llama.cpp's, in this order.
NAMES = (
    ("encoder.layers", "blk"),
    ("embeddings.", ""),
    ("self_attn.", "attn_"),
    ("out_proj", "out"),
    ("q_proj", "q"),
    ("k_proj", "k"),
    ("v_proj", "v"),
    ("pre_layrnorm", "pre_ln"),
    ("post_layernorm", "post_ln"),
    ("layer_norm", "ln"),
    ("mlp.fc1", "ffn_up"),
    ("mlp.fc2", "ffn_down"),
    ("embedding", "embd"),
)
KINDS = {"Q4_0": 2, "Q8_0": 7}  # llama.h: llama_ftype


def named(name: str) -> str | None:
    """A tensor's name in a projector file; None if it does not belong there."""
    if "multi_modal_projector." in name:
        rest = name.split("multi_modal_projector.", 1)[1]
        return "mm." + rest.replace("linear_1", "0").replace("linear_2", "2")
    if "vision_tower." not in name:
        return None
    rest = name.split("vision_tower.", 1)[1].removeprefix("vision_model.")
    for theirs, ours in NAMES:
        rest = rest.replace(theirs, ours)
    return "v." + ("class_embd" if rest.startswith("class_embd") else rest)


def settings(writer: Any) -> None:
    """What llama.cpp must know of a CLIP ViT-L/14 at 336 pixels with LLaVA's merger."""
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)  # so it is quick_gelu
    vision = {
        "image_size": 336,
        "patch_size": 14,
        "embedding_length": 1024,
        "feed_forward_length": 4096,
        "projection_dim": 768,
        "attention.head_count": 16,
        "block_count": 24,
    }
    for key, value in vision.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])


def projector(checkpoint: Path, out: Path, kind: str) -> None:
    """Matrices in `kind`; vectors and positions in float32."""
    import numpy as np
    from safetensors.torch import load_file

    gguf: Any = import_module("gguf")
    writer = gguf.GGUFWriter(str(out), "clip")
    settings(writer)
    writer.add_file_type({"f32": 0, "f16": 1}[kind])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        target = named(name)
        if target is None:
            continue
        values = tensor.float().numpy()
        small = values.ndim > 1 and "position" not in target
        writer.add_tensor(target, values.astype(np.float16) if small and kind == "f16" else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def language_model(source: Path, lm: Path, out: Path) -> None:
    """The converter knows tokenizers by a hash of what they do to a text: this one is Qwen2's."""
    sys.path.insert(0, str(source))
    base: Any = import_module("conversion.base")
    for item in list(vars(base).values()):
        if isinstance(item, type) and hasattr(item, "get_vocab_base_pre"):
            item.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    script = str(source / "convert_hf_to_gguf.py")
    sys.argv = [script, str(lm), "--outfile", str(out), "--outtype", "f32"]
    runpy.run_path(script, run_name="__main__")


def quantize(source: Path, out: Path, kind: str) -> None:
    """With the library's own choice of what to keep larger."""
    llama: Any = import_module("llama_cpp.llama_cpp")
    wanted = llama.llama_model_quantize_default_params()
    wanted.ftype, wanted.nthread = KINDS[kind], 2
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), wanted):
        raise SystemExit(f"{source} cannot be quantized to {kind}")


if __name__ == "__main__":
    command, first, second, third = sys.argv[1:5]
    if command == "projector":
        projector(Path(first), Path(second), third)
    elif command == "lm":
        language_model(Path(first), Path(second), Path(third))
    else:
        quantize(Path(first), Path(second), third)
