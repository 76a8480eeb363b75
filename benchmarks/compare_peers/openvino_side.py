"""OpenVINO GenAI: a VLMPipeline; the encoder alone through the runtime.

A pipeline remembers prompts with their images, so every answer is about another image.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from benchmarks.compare_peers import side
from benchmarks.compare_peers.side import Opened

openvino: Any = import_module("openvino")
genai: Any = import_module("openvino_genai")
VISION = "openvino_vision_embeddings_model.xml"


def streamer(first: Callable[[], None]) -> Any:
    """Calls `first` at the first token."""

    class Streamer(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.heard = 0

        def write(self, token: Any) -> Any:
            self.heard += 1
            if self.heard == 1:
                first()
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Streamer()


def open_program(options: Namespace) -> Opened:
    """--set NAME=VALUE: properties of the processor's plugin."""
    folder = options.model
    if not (folder / "preprocessor_config.json").exists():
        raise SystemExit(f"{folder} has no preprocessor_config.json: images would be wrong")
    properties = {"INFERENCE_NUM_THREADS": options.threads, **options.settings}
    pipeline = genai.VLMPipeline(str(folder), "CPU", **properties)
    text, last = (folder.parent / "prompt.txt").read_text(), {"positions": 0}

    def answer(number: int, tokens: int, first: Callable[[], None]) -> None:
        asked = genai.GenerationConfig()
        asked.min_new_tokens = asked.max_new_tokens = tokens
        asked.ignore_eos, asked.do_sample = True, False
        picture = openvino.Tensor(side.image(number)[None])
        done = pipeline.generate(
            text, images=[picture], generation_config=asked, streamer=streamer(first)
        )
        last["positions"] = done.perf_metrics.get_num_input_tokens()

    def compiled() -> Any:
        model = openvino.Core().compile_model(str(folder / VISION), "CPU", properties)
        return model.create_infer_request()

    def encoder() -> Callable[[int], None]:
        request = compiled()
        prepared = side.pixel_values(0)

        def encode(number: int) -> None:
            request.infer({0: prepared})

        return encode

    def features() -> Any:
        request = compiled()
        request.infer({0: side.pixel_values(0)})
        return request.get_output_tensor(0).data

    names = ("openvino", "openvino-genai")
    versions = {name: metadata.version(name) for name in names}
    return Opened(answer, versions, lambda: last["positions"], encoder, features)


if __name__ == "__main__":
    side.measure(open_program)
