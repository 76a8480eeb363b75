"""Recorded components in memory, run by plain ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from edgevlm.engines.backends import sessions
from edgevlm.engines.lowering import capabilities
from edgevlm.export.write import check_shapes, record
from edgevlm.toolkit.checkpoints.safetensors_io import Entry, Written
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import this_cpu
from edgevlm.toolkit.vlm.components import Component


def model_of(part: Component, tensors: Mapping[str, Array]) -> onnx.ModelProto:
    """The recorded model with its weights inside the protobuf, checked in full."""
    recorded = record(part, "fp32")
    values = {name: np.asarray(tensors[name]) for name in part.shapes} | recorded.ops.constants
    entries = {name: Entry("fp32", array.shape, 0) for name, array in values.items()}
    model = recorded.model("weights", Written(entries, "", 0))
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    onnx.checker.check_model(model, full_check=True)
    check_shapes(model)
    return model


def run(model: onnx.ModelProto, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name. Raises UnsupportedError where this ONNX Runtime is too old for the graph."""
    if model.opset_import[0].version > capabilities.of(this_cpu()).opset:
        raise UnsupportedError("a portable graph needs opset 24")
    session = sessions.open_session(model.SerializeToString(), sessions.session_options(1))
    names = [output.name for output in session.get_outputs()]
    known = {value.name for value in session.get_inputs()}
    found = session.run(names, {k: v for k, v in feed.items() if k in known})
    return dict(zip(names, found, strict=True))
