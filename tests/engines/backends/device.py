"""A stand-in for ONNX Runtime on a card: memory that only the session reaches, real arithmetic.

Arrays on the "card" have addresses of their own, beside this process's. Sessions run on the
processor, on what was bound; a call with the number of a CUDA graph runs what was bound when that
number was first used, as a replay would. What it takes more is handed to the real package.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto

CUDA = "CUDAExecutionProvider"
_REAL = onnxruntime.InferenceSession
_BASE = 1 << 52  # where the card's addresses begin: nothing of this process is there
_TYPES: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT64: np.int64,
}


class Card:
    """The memory of a card by address, and a record of what was asked of it."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.copies: list[tuple[str, int]] = []
        self.runs: list[tuple[int, int]] = []  # the graph's number, and the binding
        self.options: list[dict[str, str]] = []
        self.released: list[int] = []
        self.elsewhere: list[tuple[str, str]] = []  # nodes that a session runs on the processor
        self._next = _BASE

    def allocate(self, shape: Sequence[int], kind: int) -> int:
        """Memory that holds no numbers yet."""
        address, array = self._next, np.empty(tuple(shape), _TYPES[kind])
        array[...] = np.nan if array.dtype.kind == "f" else 99
        self.memory[address] = array
        self._next += -(-max(array.nbytes, 1) // 256) * 256
        return address

    def view(self, address: int, shape: Sequence[int], kind: int) -> Any:
        """What a pointer into the card's memory shows."""
        start = max(a for a in self.memory if a <= address)
        whole, dtype = self.memory[start].reshape(-1), np.dtype(_TYPES[kind])
        assert whole.dtype == dtype, "another type than what was allocated"
        first, count = (address - start) // dtype.itemsize, int(np.prod(shape))
        assert first + count <= whole.size, "beyond what was allocated"
        return whole[first : first + count].reshape(tuple(shape))


def package(card: Card) -> Any:
    """A module that stands in for onnxruntime."""

    class OrtValue:
        def __init__(self, address: int, shape: Sequence[int], kind: int) -> None:
            self.address, self.dims, self.kind = address, tuple(shape), kind

        @classmethod
        def ortvalue_from_shape_and_type(
            cls, shape: Sequence[int], kind: int, device: str, number: int
        ) -> OrtValue:
            assert (device, number) == ("cuda", 0)
            return cls(card.allocate(shape, kind), shape, kind)

        def data_ptr(self) -> int:
            return self.address

        def update_inplace(self, array: np.ndarray[Any, Any]) -> None:
            target = card.view(self.address, self.dims, self.kind)
            assert array.dtype == target.dtype
            assert array.shape == target.shape
            assert array.flags.c_contiguous
            target[...] = array
            card.copies.append(("to the card", array.nbytes))

        def numpy(self) -> np.ndarray[Any, Any]:
            array: np.ndarray[Any, Any] = card.view(self.address, self.dims, self.kind).copy()
            card.copies.append(("from the card", array.nbytes))
            return array

    class Binding:
        def __init__(self, session: Any) -> None:
            self.session = session
            self.inputs: dict[str, Any] = {}
            self.outputs: dict[str, Any] = {}
            self.left: dict[str, Any] = {}

        def bind_input(self, name: str, *where: Any) -> None:
            self.inputs[name] = self._seen(*where)

        def bind_output(self, name: str, device: str, *where: Any) -> None:
            self.outputs[name] = self._seen(device, *where) if where else None

        @staticmethod
        def _seen(device: str, number: int, kind: int, shape: Sequence[int], address: int) -> Any:
            assert (device, number) == ("cuda", 0), "memory that no CUDA graph may use"
            return card.view(address, shape, kind)

        def get_outputs(self) -> list[Any]:
            return [SimpleNamespace(numpy=lambda n=name: self.left[n]) for name in self.outputs]

    class InferenceSession:
        def __init__(
            self,
            path: str,
            options: Any,
            providers: list[tuple[str, Any]],
            disabled_optimizers: None,
            *,
            enable_fallback: int,
            read_config_from_model: int,
        ) -> None:
            ((name, given),) = providers
            assert not enable_fallback  # a failure is not tried again on the processor
            assert name == CUDA
            card.options.append(given)
            self._inner = _REAL(path, options, providers=["CPUExecutionProvider"])
            self._captured: dict[int, Binding] = {}

        def get_providers(self) -> list[str]:
            return [CUDA, "CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            nodes = [SimpleNamespace(name=n, op_type=op) for n, op in card.elsewhere]
            nodes.append(SimpleNamespace(name="s", op_type="Shape"))
            return [SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)]

        def get_inputs(self) -> Any:
            return self._inner.get_inputs()

        def get_modelmeta(self) -> Any:
            return self._inner.get_modelmeta()

        def io_binding(self) -> Binding:
            return Binding(self)

        def run_with_iobinding(self, binding: Binding, options: Any) -> None:
            graph = int(options.get_run_config_entry("gpu_graph_id"))
            card.runs.append((graph, id(binding)))
            bound = self._captured.setdefault(graph, binding) if graph >= 0 else binding
            names = list(bound.outputs)
            found = self._inner.run(names, bound.inputs)
            for name, array in zip(names, found, strict=True):
                buffer = bound.outputs[name]
                if buffer is None:
                    binding.left[name] = array
                else:
                    np.copyto(buffer, array, casting="no")

        def release_captured_graph(self, graph: int) -> None:
            card.released.append(graph)
            self._captured.pop(graph, None)

    return SimpleNamespace(
        OrtValue=OrtValue,
        InferenceSession=InferenceSession,
        GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        preload_dlls=lambda: print("Failed to load libcublas.so.13"),
    )
