"""The files of an ONNX Runtime engine: lowered graphs, and the weights that they read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgevlm.engines.backends.common import place
from edgevlm.engines.lowering.given import of_bundle
from edgevlm.toolkit.bundle import static_weights
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.checkpoints.safetensors_io import (
    Blocks,
    Entry,
    SafetensorsFile,
    TensorSpec,
    row_blocks,
    write_safetensors,
)
from edgevlm.toolkit.errors import needing
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Change:
    """A stored tensor in another form. make: its blocks, of what is stored."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[Array], Blocks] = row_blocks


def read_graph(file: Path, weights: Path | None = None) -> onnx.ModelProto:
    """A graph whose weights stay in their file, which is `weights`. Raises MissingExtra, or
    BundleError for what is no graph, or reads other files.
    """
    with needing("onnx", "export", purpose="building an engine"):
        import onnx
    with of_bundle(str(file)):
        model = onnx.load(str(file), load_external_data=False)
        if weights is not None:
            _check_weights(model, weights)
        return model


def _check_weights(model: onnx.ModelProto, weights: Path) -> None:
    """Raise ValueError for a tensor that is not one of this file, BundleError for FP8 that holds
    what is no number: an engine for a card elsewhere is not compared with anything here.
    """
    file = SafetensorsFile(weights)
    static_weights.check(file)
    spans = {(e.offset, e.nbytes) for e in file.entries.values()}
    for tensor in _external(model):
        where = {item.key: item.value for item in tensor.external_data}
        location = where.get("location", "")
        if location != weights.name:
            raise ValueError(f"{tensor.name:.80} is in {location!r:.80}, outside {weights.name}")
        if (int(where.get("offset", 0)), int(where.get("length", -1))) not in spans:
            raise ValueError(f"{tensor.name:.80} is not where {weights.name} has a tensor")


def stored(file: SafetensorsFile, model: onnx.ModelProto) -> dict[str, tuple[str, Entry]]:
    """For each tensor that a graph reads from the file, by its name there: its stored name, and how
    it is stored.
    """
    by_offset = {entry.offset: name for name, entry in file.entries.items()}
    names = {t.name: by_offset[offset_of(t)] for t in _external(model)}
    return {tensor: (name, file.entries[name]) for tensor, name in names.items()}


def write(
    source: Path,
    folder: Path,
    record: ComponentRecord,
    model: onnx.ModelProto,
    changes: Mapping[str, Change],
    *,
    anew: bool = False,
) -> None:
    """Write a component's lowered graph, and its weights with `changes`, by stored name.

    source: the folder with its weights, which are placed beside the graph as they are if nothing
    changes. anew: write even then those alone that the graph reads.
    """
    if changes or anew:
        _write_weights(source, folder, record, model, changes)
    else:
        place(source / record.weights, folder / record.weights)
    (folder / record.graph).write_bytes(model.SerializeToString())


def _write_weights(
    source: Path,
    folder: Path,
    record: ComponentRecord,
    model: onnx.ModelProto,
    changes: Mapping[str, Change],
) -> None:
    """Write the weights that the graph reads, and point its tensors at them."""
    file = SafetensorsFile(source / record.weights)
    read = {offset_of(tensor) for tensor in _external(model)}
    kept = {name: e for name, e in file.entries.items() if e.offset in read}
    made = {name: changes.get(name, Change(e.dtype, e.shape)) for name, e in kept.items()}
    specs = [TensorSpec(name, change.dtype, change.shape) for name, change in made.items()]

    def produce(tensor: TensorSpec) -> Blocks:
        return made[tensor.name].make(file.read(tensor.name))

    written = write_safetensors(folder / record.weights, specs, produce)
    by_old_offset = {file.entries[name].offset: e for name, e in written.entries.items()}
    for tensor in _external(model):
        entry = by_old_offset[offset_of(tensor)]
        span = {"location": record.weights, "offset": entry.offset, "length": entry.nbytes}
        del tensor.external_data[:]
        for key, value in span.items():
            tensor.external_data.add(key=key, value=str(value))


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [t for t in model.graph.initializer if t.data_location == t.EXTERNAL]


def offset_of(tensor: onnx.TensorProto) -> int:
    """Where an external tensor begins in its file."""
    return next(int(item.value) for item in tensor.external_data if item.key == "offset")


def without_logits(folder: Path, record: ComponentRecord) -> ComponentRecord:
    """Cut a compiled decoder's output layer from its graph and its weights; its new record."""
    from edgevlm.engines.lowering.graph import cut

    weights = folder / record.weights
    model = read_graph(folder / record.graph)
    scored = {port.name for port in record.outputs if not port.updates}
    cut(model, ["score"], scored)
    with tempfile.TemporaryDirectory(dir=folder) as whole:
        weights.replace(Path(whole) / record.weights)
        write(Path(whole), folder, record, model, {}, anew=True)
    return replace(
        record,
        inputs=tuple(port for port in record.inputs if port.name != "score"),
        outputs=tuple(port for port in record.outputs if port.updates),
    )
