"""Reading the graphs of a bundle, which somebody else may have written."""

from __future__ import annotations

from pathlib import Path

import onnx

from edgevlm.engines.lowering.given import of_bundle
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile


def graph(file: Path, weights: Path | None = None) -> onnx.ModelProto:
    """A graph whose weights stay in their file. Raises BundleError for what is none.

    weights: the only file that its tensors may be in, each where that file has a tensor.
    """
    with of_bundle(str(file)):
        model = onnx.load(str(file), load_external_data=False)
        if weights is not None:
            _check_weights(model, weights)
        return model


def _check_weights(model: onnx.ModelProto, weights: Path) -> None:
    spans = {(e.offset, e.nbytes) for e in SafetensorsFile(weights).entries.values()}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {item.key: item.value for item in tensor.external_data}
        location = where.get("location", "")
        if location != weights.name:
            raise ValueError(f"{tensor.name:.80} is in {location!r:.80}, outside {weights.name}")
        if (int(where.get("offset", 0)), int(where.get("length", -1))) not in spans:
            raise ValueError(f"{tensor.name:.80} is not where {weights.name} has a tensor")
