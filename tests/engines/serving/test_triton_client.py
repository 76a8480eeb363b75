"""The README of a repository, run with Triton's own client; its configurations, read with it.

The server is a few lines of gRPC around the model of the repository, with tritonclient's own
messages; what Triton itself does beyond that is not here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.ops.vocabulary import Array
from tests.engines.serving.conftest import GOLDEN
from tests.engines.serving.test_triton import deploy
from tests.engines.serving.triton_server import Failure, Loaded, loaded

pytestmark = pytest.mark.scale
grpc = pytest.importorskip("grpc", reason="needs tritonclient[grpc]: make test-scale")
pytest.importorskip("tritonclient", reason="needs tritonclient[grpc]: make test-scale")
_DTYPES: dict[str, Any] = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BOOL": bool}


def inputs_of(request: Any) -> dict[str, Array]:
    """The arrays of a ModelInferRequest, as the server gives them to a model."""
    from tritonclient.utils import deserialize_bytes_tensor

    found = {}
    for port, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if port.datatype == "BYTES":
            array = deserialize_bytes_tensor(raw)
        else:
            array = np.frombuffer(raw, _DTYPES[port.datatype])
        found[port.name] = array.reshape(port.shape)
    return found


def response_of(messages: Any, outputs: dict[str, Array]) -> Any:
    """The same of a ModelInferResponse."""
    from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

    made = messages.ModelInferResponse()
    for name, array in outputs.items():
        datatype = np_to_triton_dtype(array.dtype)
        made.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if datatype == "BYTES":
            made.raw_output_contents.append(serialize_byte_tensor(array).item())
        else:
            made.raw_output_contents.append(array.tobytes())
    return made


@contextmanager
def serving(model: Loaded) -> Iterator[int]:
    """The port of a gRPC server around a model."""
    from tritonclient.grpc import service_pb2 as messages
    from tritonclient.grpc import service_pb2_grpc as services

    class Service(services.GRPCInferenceServiceServicer):  # type: ignore[misc]
        def ModelInfer(self, request: Any, context: Any) -> Any:
            (found,) = model.infer(inputs_of(request))
            assert not isinstance(found, Failure)
            return response_of(messages, found)

        def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
            for request in requests:
                begun, last = model.begin(inputs_of(request)), False
                while not last:
                    outputs, last = model.next(begun)
                    answer = response_of(messages, outputs)
                    yield messages.ModelStreamInferResponse(infer_response=answer)

    server = grpc.server(ThreadPoolExecutor(2))
    services.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def run_the_readme(out: Path, port: int) -> None:
    """The one block of Python in a repository's README, asking a server on `port`."""
    page = (out / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(compile(code.replace("localhost:8001", f"127.0.0.1:{port}"), "README.md", "exec"), {})


@pytest.mark.parametrize("kind", ["engine", "tower"])
def test_the_client_reads_the_configurations(
    kind: str, engine: Path, tower: Path, tmp_path: Path
) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    models = deploy(engine if kind == "engine" else tower, tmp_path / "out", "--name", "m")
    for file in models.glob("*/config.pbtxt"):
        config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
        assert config.name == file.parent.name
        assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
        assert config.model_transaction_policy.decoupled == (kind == "engine")
        assert config.HasField("dynamic_batching") == (kind == "tower")


def test_the_code_that_asks_streams_the_answer(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from PIL import Image

    Image.open(GOLDEN / "image.png").convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    models = deploy(engine, tmp_path / "out", "--name", "m")
    capsys.readouterr()
    with loaded(models, "m") as model, serving(model) as port:
        run_the_readme(tmp_path / "out", port)
    with Session.open(engine, threads=1) as session:
        question = Question("What is in the image?", "photo.jpg", 2048, literal=True)
        assert capsys.readouterr().out == session.answer(question).text


def test_the_code_that_embeds_gets_embeddings(
    tower: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for photo, name in zip(photos, ("a.jpg", "b.jpg"), strict=False):
        (tmp_path / name).write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path)
    models = deploy(tower, tmp_path / "out", "--name", "m", "--slots", "4")
    capsys.readouterr()
    with loaded(models, "m") as model, serving(model) as port:
        run_the_readme(tmp_path / "out", port)
    assert capsys.readouterr().out == "(2, 32)\n"
