"""transformers: a LlavaForConditionalGeneration and its `generate`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from benchmarks.compare_peers import side
from benchmarks.compare_peers.side import Opened

transformers: Any = import_module("transformers")


class Streamer:
    """Hears the prompt, then every token as it is chosen."""

    def __init__(self, first: Callable[[], None]) -> None:
        self._first, self._heard = first, 0

    def put(self, value: Any) -> None:
        """The second call is the first token."""
        self._heard += 1
        if self._heard == 2:
            self._first()

    def end(self) -> None:
        """Nothing to do at the end."""


def open_program(options: Namespace) -> Opened:
    """--set dtype=float32|bfloat16, attention=sdpa|eager."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    settings, folder = options.settings, options.model
    dtype = getattr(torch, settings["dtype"])
    model, told = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=settings["attention"], output_loading_info=True
    )
    if told["missing_keys"]:
        raise SystemExit(f"weights of {folder} were not found: {sorted(told['missing_keys'])[:3]}")
    model = model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "<image>" * side.IMAGE_TOKENS + (folder.parent / "prompt.txt").read_text()
    asked = tokenizer(text, return_tensors="pt")

    def pixels(number: int) -> Any:
        return torch.from_numpy(side.pixel_values(number)).to(dtype)

    @torch.inference_mode()
    def answer(number: int, tokens: int, first: Callable[[], None]) -> None:
        model.generate(
            **asked,
            pixel_values=pixels(number),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            streamer=Streamer(first),
        )

    @torch.inference_mode()
    def features(values: Any) -> Any:
        found = model.get_image_features(pixel_values=values)
        return found.pooler_output if hasattr(found, "pooler_output") else found

    def encoder() -> Callable[[int], None]:
        prepared = pixels(0)

        def encode(number: int) -> None:
            features(prepared)

        return encode

    def printed() -> Any:
        found = features(pixels(0))
        return found[0].float().numpy()

    versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
    return Opened(answer, versions, lambda: asked["input_ids"].shape[1], encoder, printed)


if __name__ == "__main__":
    side.measure(open_program)
