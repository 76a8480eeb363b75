"""Recorded components in memory, run by plain ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from edgevlm.engines.lowering.capabilities import reads_opset_23_only
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
    if reads_opset_23_only(this_cpu()) and model.opset_import[0].version > 23:
        raise UnsupportedError("a portable graph needs opset 24")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    known = {value.name for value in session.get_inputs()}
    found = session.run(names, {k: v for k, v in feed.items() if k in known})
    return dict(zip(names, found, strict=True))
