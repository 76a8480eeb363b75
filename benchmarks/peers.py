"""The peers' side of the language model: the same shapes as preset:llava-qwen2-0.5b.

`python -m benchmarks.peers checkpoint OUT` writes a random checkpoint that transformers reads;
`python -m benchmarks.peers genai CHECKPOINT OUT THREADS` converts it to onnxruntime-genai's format
with logits for the last position only, as edgevlm computes them.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.common import child

GENAI_PACKAGE = "onnxruntime-genai"
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 255,
    "pad_token_id": 254,
}


def checkpoint(out: Path) -> None:
    """A Qwen2 of `SHAPE` with random float32 weights and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers: Any = import_module("transformers")
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).save_pretrained(out)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.eos_token, fast.pad_token = letters[255], letters[254]
    fast.save_pretrained(out)


def builder_command(source: Path, out: Path) -> list[str]:
    """onnxruntime-genai's own builder on a checkpoint."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
    where = ["-o", str(out), "-p", "fp32", "-e", "cpu", "-c", str(out / "cache")]
    return [*builder, *where, "--extra_options", "prune_lm_head=true"]


def genai(source: Path, out: Path, threads: int) -> None:
    """The builder in a process of its own, and the number of threads in its result."""
    child(builder_command(source, out))
    file = out / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_text(json.dumps(config, indent=1))


def make(*command: str) -> float:
    """Run one of this module's commands; its peak memory in MB."""
    return child([sys.executable, "-m", "benchmarks.peers", *command]).peak_rss_mb


if __name__ == "__main__":
    if sys.argv[1] == "checkpoint":
        checkpoint(Path(sys.argv[2]))
    else:
        genai(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
