"""A training step beside the same model built from transformers' modules.

CLIP-L/14-336, MLP and a decoder of Qwen2.5-0.5B's shape with random weights: instruction tuning of
projector and language model, the tower frozen, one image and 64 tokens of text, float32, AdamW. One
folder holds the weights of both. Each side runs in processes of its own, in turn; its losses
must be equal, and time is the processor's, as other work on a machine does not change that.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Bar, Report, child, parser, spread, wait_until_quiet, workplace

SIDES = ("ours", "transformers")
IMAGE, TEXT, TOKENS = 151_646, 64, 576
BEFORE, TARGETS = 4, 40  # text tokens before the image; those at the end that are learned


def make_folder(folder: Path) -> None:
    """LlavaForConditionalGeneration as transformers saves it, with a byte tokenizer."""
    import torch
    import transformers

    from edgevlm.toolkit.text.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    hf: Any = transformers
    vision = hf.CLIPVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        patch_size=14,
        image_size=336,
        projection_dim=768,
    )
    text = hf.Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151_936,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=256,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
    )
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer({"<end>": 256, "<image>": IMAGE}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    side = {"height": 336, "width": 336}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": side,
        "size": {"shortest_edge": 336},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def batch() -> tuple[Any, Any, Any]:
    """Pixels [1, 3, 336, 336], ids [1, S] with the image's positions, the first target."""
    import torch

    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    text = torch.randint(5, 250, (1, TEXT), generator=generator)
    image = torch.full((1, TOKENS), IMAGE)
    ids = torch.cat([text[:, :BEFORE], image, text[:, BEFORE:]], 1)
    return pixels, ids, ids.shape[1] - TARGETS


def ours(folder: Path) -> tuple[Any, Callable[[], Any]]:
    """Our module and its loss."""
    import torch

    from edgevlm.toolkit import systems
    from edgevlm.toolkit.checkpoints.layouts.source import Options
    from edgevlm.training.memory import return_freed_tensors
    from edgevlm.training.vlm import VLM, token_loss

    return_freed_tensors()  # as `edgevlm train` does
    source = systems.load(folder, Options())
    model = VLM(source.model).load(source.weights)
    pixels, ids, first = batch()
    rows = torch.full_like(ids, -1)
    rows[0, BEFORE : BEFORE + TOKENS] = torch.arange(TOKENS)
    inputs = {
        "pixels": {source.model.encoders[0].name: pixels},
        "ids": torch.where(rows >= 0, 0, ids),
        "rows": rows,
        "score": torch.arange(first - 1, ids.shape[1] - 1)[None],
    }
    return model, lambda: token_loss(model(**inputs), ids[:, first:]) / TARGETS


def theirs(folder: Path) -> tuple[Any, Callable[[], Any]]:
    """transformers' module and its loss."""
    import transformers

    kind: Any = transformers.LlavaForConditionalGeneration
    model = kind.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")
    pixels, ids, first = batch()
    labels = ids.clone()
    labels[:, :first] = -100
    return (
        model,
        lambda: model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss,
    )


def run_side(side: str, folder: Path, steps: int) -> None:
    """Print losses, processor and wall seconds of each step, and the peak memory."""
    import torch

    model, loss_of = (ours if side == "ours" else theirs)(folder)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("encoder.", "model.vision_tower.")))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    found: dict[str, list[float]] = {"loss": [], "processor_s": [], "wall_s": []}
    for _ in range(steps):
        begun = time.process_time(), time.perf_counter()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found["loss"].append(loss.item())
        found["processor_s"].append(time.process_time() - begun[0])
        found["wall_s"].append(time.perf_counter() - begun[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(found | {"peak_rss_mb": peak / (1e6 if sys.platform == "darwin" else 1024)}))


def measure(folder: Path, options: Namespace) -> dict[str, list[dict[str, Any]]]:
    """Both sides in turn, `rounds` times."""
    done: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            wait_until_quiet(20)
            command = [sys.executable, "-m", "benchmarks.train_step", "--side", side]
            command += ["--work", str(folder.parent), "--steps", str(options.steps)]
            done[side].append(json.loads(child(command).stdout.splitlines()[-1]))
    return done


def report(done: dict[str, list[dict[str, Any]]]) -> Report:
    """Medians over all steps but the first of each process, which allocates."""
    columns = ("side", "processor s a step", "wall s a step", "peak MB", "loss")
    result = Report("train_step", columns, ("torch", "transformers"))
    medians: dict[str, dict[str, float]] = {}
    for side, runs in done.items():
        figures = {
            "processor_s": spread([x for run in runs for x in run["processor_s"][1:]]),
            "wall_s": spread([x for run in runs for x in run["wall_s"][1:]]),
            "peak_rss_mb": spread([run["peak_rss_mb"] for run in runs], 0),
        }
        losses = [f"{loss:.5f}" for loss in runs[0]["loss"]]
        result.rows.append((side, *figures.values(), " ".join(losses)))
        result.measured[side] = figures | {"losses": runs[0]["loss"]}
        medians[side] = {name: value.median for name, value in figures.items()}
    first, second = (medians[side] for side in SIDES)
    for name, limit in (("processor_s", 1.1), ("wall_s", 1.1), ("peak_rss_mb", 1.0001)):
        result.bars.append(Bar(f"{name}, ours / transformers", first[name] / second[name], limit))
    pairs = zip(done["ours"][0]["loss"], done["transformers"][0]["loss"], strict=True)
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    result.bars.append(Bar("losses, relative difference", apart, 1e-4))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a bar does not hold."""
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=3, help="processes of each side")
    command_line.add_argument("--steps", type=int, default=4, help="steps of each process")
    command_line.add_argument("--side", choices=SIDES, help="one side only (used by itself)")
    options = command_line.parse_args(arguments)
    with workplace(options) as work:
        folder = work / "half"
        if options.side is not None:
            run_side(options.side, folder, options.steps)
            return 0
        if not folder.exists():
            make_folder(folder)
        return 0 if report(measure(folder, options)).finish(options) else 1


if __name__ == "__main__":
    sys.exit(main())
