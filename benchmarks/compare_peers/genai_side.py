"""onnxruntime-genai: the language model alone, on as many positions as with an image."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from importlib import metadata

import numpy as np
import onnxruntime_genai as og

from benchmarks.compare_peers import side
from benchmarks.compare_peers.side import POSITIONS, Opened

VOCABULARY = 20_000


def open_program(options: Namespace) -> Opened:
    """The threads go into the model's settings."""
    config = og.Config(str(options.model))
    session = {"intra_op_num_threads": options.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)

    def answer(number: int, tokens: int, first: Callable[[], None]) -> None:
        ids = np.random.default_rng(number).integers(0, VOCABULARY, POSITIONS).astype(np.int32)
        search, length = og.GeneratorParams(model), POSITIONS + tokens
        search.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=1
        )
        generator = og.Generator(model, search)
        generator.append_tokens(ids)
        generator.generate_next_token()
        first()
        for _ in range(tokens - 1):
            generator.generate_next_token()

    names = ("onnxruntime-genai", "onnxruntime")
    versions = {name: metadata.version(name) for name in names}
    return Opened(answer, versions, lambda: POSITIONS)


if __name__ == "__main__":
    side.measure(open_program)
