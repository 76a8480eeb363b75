"""What Triton's Python backend promises a model, from its documentation; no server runs.

github.com/triton-inference-server/python_backend (README) says what `triton_python_backend_utils`
has and how a model is called; its `model_config.proto` says which fields config.pbtxt may have.
Tensors are gone once `execute` has returned, and every answer is held against the configuration.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from edgevlm.toolkit.ops.vocabulary import Array

_TYPES: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
}
_FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL
# Messages of model_config.proto, as far as a configuration of ours goes: name, type; * repeated.
_MESSAGES = {
    "ModelInput": "name:string data_type:DataType dims:*int64 optional:bool",
    "ModelOutput": "name:string data_type:DataType dims:*int64",
    "ModelInstanceGroup": "name:string kind:Kind count:int32 gpus:*int32",
    "ModelTransactionPolicy": "decoupled:bool",
    "ModelDynamicBatching": "preferred_batch_size:*int32 max_queue_delay_microseconds:uint64",
    "ModelParameter": "string_value:string",
    "Entry": "key:string value:ModelParameter",
    "ModelConfig": "name:string platform:string backend:string max_batch_size:int32 "
    "input:*ModelInput output:*ModelOutput instance_group:*ModelInstanceGroup "
    "model_transaction_policy:ModelTransactionPolicy dynamic_batching:ModelDynamicBatching "
    "parameters:*Entry",
}
_ENUMS = {"DataType": list(_TYPES), "Kind": ["KIND_AUTO", "KIND_CPU", "KIND_GPU", "KIND_MODEL"]}


def parsed(text: str) -> dict[str, Any]:
    """config.pbtxt by protobuf's own reader of its text format; an unknown field is an error."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
    from google.protobuf.json_format import MessageToDict

    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(["UNKNOWN_" + name, *values]):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate((f.split(":") for f in fields.split()), 1):
            made = message.field.add(name=field, number=number)
            made.label = made.LABEL_REPEATED if kind.startswith("*") else made.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            if kind in _ENUMS or kind in _MESSAGES:
                made.type = made.TYPE_ENUM if kind in _ENUMS else made.TYPE_MESSAGE
                made.type_name = f".t.{kind}"
            else:
                made.type = getattr(made, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))()
    text_format.Parse(text, config)
    found: dict[str, Any] = MessageToDict(config, preserving_proto_field_name=True)
    found["parameters"] = {e["key"]: e.get("value", {}) for e in found.get("parameters", [])}
    return found


class TritonModelException(Exception):
    """What a model raises where it cannot be loaded."""


class TritonError:
    """Why there is no answer."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED = range(6)
    ALREADY_EXISTS, CANCELLED = 6, 7

    def __init__(self, msg: str, code: int = INTERNAL) -> None:
        assert isinstance(msg, str)
        self.msg, self.code = msg, code

    def message(self) -> str:
        return self.msg


class Tensor:
    """A name and an array."""

    def __init__(self, name: str, array: Array) -> None:
        assert array.dtype.type in _TYPES.values(), array.dtype
        self._name = name
        self._array: Array | None = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        assert self._array is not None, "the tensor of a request is gone when execute has returned"
        return self._array

    def forget(self) -> None:
        self._array = None


class InferenceResponse:
    """Tensors, or an error."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        assert type(output_tensors) is list
        self.tensors, self.failure = output_tensors, error

    def has_error(self) -> bool:
        return self.failure is not None


class Sender:
    """Where a decoupled model sends its responses."""

    def __init__(self, request: InferenceRequest) -> None:
        self._request, self._ended = request, False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self._ended, "a response behind the final one"
        self._ended = bool(flags & _FINAL)
        self._request.responses.put((response, self._ended))

    def is_cancelled(self) -> bool:
        return self._request.is_cancelled()


class InferenceRequest:
    """Inputs; and, for the test, what came back."""

    def __init__(self, inputs: Mapping[str, Array]) -> None:
        self._inputs = [Tensor(name, array.copy()) for name, array in inputs.items()]
        self.responses: SimpleQueue[tuple[InferenceResponse | None, bool]] = SimpleQueue()
        self.cancelled = False

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def is_cancelled(self) -> bool:
        return self.cancelled

    def get_response_sender(self) -> Sender:
        return Sender(self)


def _by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def _utils() -> types.ModuleType:
    found: Any = types.ModuleType("triton_python_backend_utils")
    found.Tensor, found.TritonError, found.InferenceResponse = (
        Tensor,
        TritonError,
        InferenceResponse,
    )
    found.TritonModelException = TritonModelException
    found.TRITONSERVER_RESPONSE_COMPLETE_FINAL = _FINAL
    found.get_input_tensor_by_name = _by_name
    module: types.ModuleType = found
    return module


class Failure(Exception):
    """An error that a client got, and its code."""

    def __init__(self, error: TritonError) -> None:
        super().__init__(error.message())
        self.code = error.code


class Loaded:
    """A model of a repository, as a server has loaded it."""

    def __init__(self, config: dict[str, Any], model: Any) -> None:
        self.config, self._model = config, model
        self.decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        self._batched = config.get("max_batch_size", 0) > 0

    def begin(self, inputs: Mapping[str, Array]) -> InferenceRequest:
        """A request to a decoupled model."""
        assert self.decoupled
        self._check_inputs(inputs)
        request = InferenceRequest(inputs)
        assert self._model.execute([request]) is None
        self._forget([request])
        return request

    def next(self, request: InferenceRequest) -> tuple[dict[str, Array], bool]:
        """The next response within a minute, and whether it is the last. Raises Failure."""
        response, last = request.responses.get(timeout=60)
        assert response is not None
        return self._outputs(response), last

    def infer(self, *many: Mapping[str, Array] | None) -> list[dict[str, Array] | Failure]:
        """Several requests in one batch; None stands for one whose client has gone."""
        assert not self.decoupled
        requests = []
        for inputs in many:
            if inputs is not None:
                self._check_inputs(inputs)
            requests.append(InferenceRequest(inputs or {}))
            requests[-1].cancelled = inputs is None
        responses = self._model.execute(requests)
        assert type(responses) is list and len(responses) == len(requests)
        self._forget(requests)
        found: list[dict[str, Array] | Failure] = []
        for response in responses:
            try:
                found.append(self._outputs(response))
            except Failure as failure:
                found.append(failure)
        return found

    def _forget(self, requests: list[InferenceRequest]) -> None:
        for request in requests:
            for tensor in request.inputs():
                tensor.forget()

    def _check_inputs(self, inputs: Mapping[str, Array]) -> None:
        known = {port["name"]: port for port in self.config["input"]}
        assert inputs.keys() <= known.keys()
        for name, port in known.items():
            assert name in inputs or port.get("optional"), f"{name} is required"
            if name in inputs:
                self._check(port, inputs[name])

    def _outputs(self, response: InferenceResponse) -> dict[str, Array]:
        if response.failure is not None:
            raise Failure(response.failure)
        known = {port["name"]: port for port in self.config["output"]}
        found = {tensor.name(): tensor.as_numpy() for tensor in response.tensors}
        assert found.keys() == known.keys()
        for name, array in found.items():
            self._check(known[name], array)
        return found

    def _check(self, port: dict[str, Any], array: Array) -> None:
        """A tensor has the type and the shape that the configuration states."""
        assert array.dtype.type is _TYPES[port["data_type"]], (port, array.dtype)
        dims = [int(n) for n in port["dims"]]
        shape = array.shape[1:] if self._batched else array.shape
        assert len(shape) == len(dims), (port, array.shape)
        assert all(n in (-1, size) for n, size in zip(dims, shape, strict=True)), (port, shape)
        if self._batched:
            assert 1 <= array.shape[0] <= self.config["max_batch_size"]

    def finalize(self) -> None:
        self._model.finalize()


@contextmanager
def loaded(models: Path, name: str) -> Iterator[Loaded]:
    """A model of the repository `models`; raises TritonModelException if it does not load."""
    config = parsed((models / name / "config.pbtxt").read_text())
    assert config["name"] == name and config["backend"] == "python"
    sys.modules["triton_python_backend_utils"] = _utils()
    try:
        file = models / name / "1" / "model.py"
        spec = importlib.util.spec_from_file_location("model_of_a_repository", file)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
                "model_repository": str(models / name),
                "model_version": "1",
                "model_name": name,
            }
        )
    finally:
        del sys.modules["triton_python_backend_utils"]
    found = Loaded(config, model)
    try:
        yield found
    finally:
        found.finalize()
