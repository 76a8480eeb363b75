"""llama.cpp: libllama and libmtmd through the declarations of llama-cpp-python.

PYTHONPATH names the folder of the declarations; the libraries are in its llama_cpp/lib.
"""

from __future__ import annotations

import ctypes
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare_peers import side
from benchmarks.compare_peers.side import PIXELS, Opened

llama: Any = import_module("llama_cpp.llama_cpp")
mtmd: Any = import_module("llama_cpp.mtmd_cpp")
CONTEXT, BATCH, SMALL_BATCH = 1024, 1024, 512
SILENT = llama.llama_log_callback(lambda level, text, data: None)


class Llama:
    """A language model, its context and the model of images."""

    def __init__(self, model: Path, projector: str, threads: int) -> None:
        llama.llama_log_set(SILENT, None)
        llama.llama_backend_init()
        wanted = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(str(model).encode(), wanted)
        wanted = llama.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = CONTEXT, BATCH, SMALL_BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, wanted)
        wanted = mtmd.mtmd_context_params_default()
        wanted.use_gpu, wanted.n_threads, wanted.print_timings = False, threads, False
        self.vision = mtmd.mtmd_init_from_file(projector.encode(), self.model, wanted)
        if not (self.model and self.context and self.vision):
            raise SystemExit(f"{model} or {projector} cannot be opened")
        self.sampler = llama.llama_sampler_init_greedy()
        self.positions = 0

    @contextmanager
    def chunks(self, number: int, text: str) -> Iterator[Any]:
        """The prompt: image `number`, then `text`."""
        pixels = side.image(number)
        buffer = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
        picture = mtmd.mtmd_bitmap_init(PIXELS, PIXELS, buffer)
        words = mtmd.mtmd_default_marker() + text.encode()
        asked = mtmd.mtmd_input_text()
        asked.text, asked.text_len, asked.add_special = words, len(words), False
        asked.parse_special = True
        found, pictures = mtmd.mtmd_input_chunks_init(), (mtmd.mtmd_bitmap_p_ctypes * 1)(picture)
        check(mtmd.mtmd_tokenize(self.vision, found, ctypes.byref(asked), pictures, 1))
        yield found
        mtmd.mtmd_input_chunks_free(found)
        mtmd.mtmd_bitmap_free(picture)

    def token(self) -> int:
        """The most likely next token."""
        return int(llama.llama_sampler_sample(self.sampler, self.context, -1))

    def prompt(self, number: int, text: str) -> int:
        """Read a prompt from an empty cache; the first token."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        with self.chunks(number, text) as chunks:
            self.positions = mtmd.mtmd_helper_get_n_tokens(chunks)
            end = ctypes.byref(ctypes.c_int(0))
            arguments = (self.vision, self.context, chunks, 0, 0, BATCH, True, end)
            check(mtmd.mtmd_helper_eval_chunks(*arguments))
            return self.token()

    def encode(self, chunks: Any) -> None:
        """The encoder and merger on the image among the chunks."""
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                check(mtmd.mtmd_encode_chunk(self.vision, chunk))

    def features(self) -> Any:
        """What `encode` has left, with the row of each patch in its place.

        Its graph of a LLaVA appends the class token that CLIP puts first, and still leaves out row
        0: the first patch is lost, the others are a row early (ggml-org/llama.cpp issue 25814).
        """
        width = llama.llama_model_n_embd(self.model)
        pointer = mtmd.mtmd_get_output_embd(self.vision)
        rows = np.ctypeslib.as_array(pointer, (side.IMAGE_TOKENS, width))
        return np.roll(rows, 1, axis=0)


def check(code: int) -> None:
    """A call's result, 0 if it succeeded."""
    if code:
        raise SystemExit(f"llama.cpp refused a call: {code}")


def open_program(options: Namespace) -> Opened:
    """--set projector=FILE version=TEXT."""
    program = Llama(options.model, options.settings["projector"], options.threads)
    text = (options.model.parent / "prompt.txt").read_text()

    def answer(number: int, tokens: int, first: Callable[[], None]) -> None:
        token = program.prompt(number, text)
        first()
        one = (ctypes.c_int32 * 1)()
        for _ in range(tokens - 1):
            one[0] = token
            check(llama.llama_decode(program.context, llama.llama_batch_get_one(one, 1)))
            token = program.token()

    def encoder() -> Callable[[int], None]:
        chunks = program.chunks(0, "").__enter__()
        return lambda number: program.encode(chunks)

    def features() -> Any:
        with program.chunks(0, "") as chunks:
            program.encode(chunks)
        return program.features()

    versions = {"llama-cpp-python": options.settings["version"]}
    return Opened(answer, versions, lambda: program.positions, encoder, features)


if __name__ == "__main__":
    side.measure(open_program)
