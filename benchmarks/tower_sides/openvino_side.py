"""OpenVINO on the bundle's graphs, with our functions inlined and shapes that do not change."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any

from benchmarks.tower_sides import walk

openvino: Any = import_module("openvino")


def open_graphs(model: walk.Model, options: Namespace) -> tuple[walk.Encode, dict[str, str]]:
    """--set NAME=VALUE: properties; weights=int8: compressed as optimum-intel does it."""
    settings = dict(options.settings)
    weights = settings.pop("weights", None)
    properties = {"INFERENCE_NUM_THREADS": options.threads, **settings}
    core, count = openvino.Core(), walk.tokens(model, options.side)
    requests = {}
    for part in model.parts:
        graph = core.read_model(options.bundle / part.graph)
        shapes = {name: sizes(shape, options.side, count) for name, shape in part.inputs.items()}
        graph.reshape(shapes)
        if weights is not None:
            nncf: Any = import_module("nncf")
            graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
        requests[part.name] = core.compile_model(graph, "CPU", properties).create_infer_request()

    def run(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        requests[name].infer(inputs, share_inputs=True, share_outputs=True)
        ports = next(part for part in model.parts if part.name == name).outputs
        return {port: requests[name].get_tensor(port).data for port in ports}

    def encode(pixels: Mapping[str, Any]) -> Any:
        return model.run(run, pixels)

    return encode, {"openvino": metadata.version("openvino")}


def sizes(shape: list[Any], side: int, count: int) -> list[int]:
    """A port's shape for one image."""
    known = {"tiles": 1, "height": side, "width": side, "tokens": count}
    return [known[size] if isinstance(size, str) else size for size in shape]


if __name__ == "__main__":
    walk.measure(open_graphs)
