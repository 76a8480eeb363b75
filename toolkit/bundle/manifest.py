"""The bundle: a folder any ONNX runtime can read, and the manifest that says how it connects.

manifest.json   model configuration, components, edges, files with size and sha256
NAME.onnx       one standard-opset graph per component; its weights stay outside
NAME.safetensors  the component's weights, named as in the graph
tokenizer.json (a tower by itself has none)
golden.npz (small inputs and the reference's outputs, see toolkit/bundle/goldens.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgevlm.toolkit.bundle import mistaken, sealed, static_weights
from edgevlm.toolkit.bundle.atomic import sha256_of
from edgevlm.toolkit.checkpoints import inside
from edgevlm.toolkit.checkpoints.inside import is_plain
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import BundleError, ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise, channels
from edgevlm.toolkit.quantization.coded import Codes
from edgevlm.toolkit.quantization.plan import PrecisionPlan
from edgevlm.toolkit.strict import from_plain, read_json
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.components import Edge, Port, components, edges
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.towers import Model

FORMAT = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
GOLDENS = "golden.npz"
DTYPES = ("fp32", "fp16", "bf16")
_CHANGED = "the manifest was changed; export it again"


@dataclass(frozen=True)
class FileRecord:
    """A file's size and content."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ComponentRecord:
    """One recorded component: its graph and weights files, ports, and what it costs.

    flops: for `at`, the concrete value of every axis that changes from call to call.
    """

    name: str
    graph: str
    weights: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    params: int
    flops: int
    at: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds. `source` says where the weights came from.

    model: of a vision-language model, or with the kind "tower" of a vision tower by itself.
    """

    format: int
    made_by: str
    source: Mapping[str, Any]
    model: Mapping[str, Any]
    dtype: str
    opset: int
    components: tuple[ComponentRecord, ...]
    edges: tuple[Edge, ...]
    functions: Mapping[str, int]
    files: Mapping[str, FileRecord]
    plan: PrecisionPlan = field(default_factory=PrecisionPlan)

    def component(self, name: str) -> ComponentRecord:
        """The component called `name`."""
        return next(c for c in self.components if c.name == name)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    sealed.write(folder / MANIFEST, manifest)


def record_file(path: Path) -> FileRecord:
    """Size and hash of a finished file."""
    return FileRecord(path.stat().st_size, sha256_of(path))


class Tensors(Mapping[str, Array]):
    """A component's weights, mapped from the file: what NumpyOps runs on, in whatever precision.

    Weights in 8 or 4 bits come back under their own names, as the floats that they stand for.
    by_channel: those whose inputs are rounded too (toolkit/quantization/channels.py). input_steps:
    the same of inputs in steps known beforehand (static.py), those steps and forms.
    """

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        stored = self._file.entries
        self._formats = {
            name.removesuffix(storage.suffix): replace(
                storage,
                zero_points=name + blockwise.ZERO_POINTS in stored,
                ordered=name + blockwise.ORDER in stored,
            )
            for storage in blockwise.FORMATS
            for name in stored
            if name.endswith(storage.suffix) and name + blockwise.SCALE in stored
        }
        suffix = channels.SUFFIX
        found = [n for n in stored if n.endswith(suffix) and n + blockwise.SCALE in stored]
        self.by_channel = frozenset(name.removesuffix(suffix) for name in found)
        packed = {key + storage.suffix for key, storage in self._formats.items()} | {*found}
        self.input_steps = static_weights.input_steps(self._file)
        packed |= static_weights.names(self._file)
        packed |= {name + tail for name in packed for tail in blockwise.TAILS}
        plain = (name for name in stored if name not in packed)
        by_channel = (n.removesuffix(suffix) for n in found)
        self._names = [*plain, *self._formats, *by_channel, *self.input_steps]

    def __getitem__(self, key: str) -> Array:
        if key in self.by_channel:
            name = key + channels.SUFFIX
            return channels.dequantize(*map(self._file.read, (name, name + blockwise.SCALE)))
        if key in self.input_steps:
            return static_weights.weight(self._file, key, self.input_steps[key][1])
        coded = self.codes(key)
        if coded is not None:
            return coded.floats()
        if key not in self._file.entries:
            raise KeyError(key)
        return self._file.read(key)

    def codes(self, key: str) -> Codes | None:
        """A weight in 8 or 4 bits as it is stored; None for any other."""
        storage = self._formats.get(key)
        if storage is None:
            return None
        name = key + storage.suffix
        zeros = self._file.read(name + blockwise.ZERO_POINTS) if storage.zero_points else None
        order = self._file.read(name + blockwise.ORDER) if storage.ordered else None
        stored, scales = self._file.read(name), self._file.read(name + blockwise.SCALE)
        return Codes(storage, stored, scales, zeros, order)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        if key in self.by_channel:
            return self._file.shape(key + channels.SUFFIX)
        if key in self.input_steps:
            return self._file.shape(key + self.input_steps[key][1].suffix)
        storage = self._formats.get(key)
        if storage is None:
            return self._file.shape(key)
        outputs, stored = self._file.shape(key + storage.suffix)
        inputs = stored * 8 // storage.bits
        return (inputs, outputs) if storage.transposed else (outputs, inputs)

    def __contains__(self, key: object) -> bool:
        packed = self._formats, self.by_channel, self.input_steps, self._file.entries
        return any(key in names for names in packed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest
    model: Model

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check the manifest. Raises BundleError if this is not a bundle of ours."""
        path = Path(path)
        file = path / MANIFEST
        if not file.exists():
            raise mistaken.no_bundle(path)
        manifest = read_manifest(file)
        try:
            model = towers.from_json(dict(manifest.model), f"{file}: model")
            check_parts(str(file), model, manifest.components, manifest.edges, manifest.files)
            check_graphs(str(file), manifest.components, manifest.files)
        except ConfigError as odd:
            raise BundleError(odd.message, hint=_CHANGED) from None
        return cls(path, manifest, model)

    @property
    def vlm(self) -> ModelConfig:
        """The model with its language model. Raises UnsupportedError for a tower by itself."""
        return towers.vlm(self.model, f"bundle {self.path}")

    @property
    def sha256(self) -> str:
        """Identity of the whole bundle: the manifest holds the hash of every other file."""
        return sha256_of(self.path / MANIFEST)

    def check_sizes(self) -> None:
        """Raise BundleError for a file that is missing, elsewhere or of another size."""
        for name, record in self.manifest.files.items():
            fault = size_fault(self.path, name, record, "the manifest")
            if fault:
                raise BundleError(fault, hint="the file was changed or cut short; export it again")

    def verify(self) -> None:
        """Raise BundleError if any file differs from what was exported (reads everything)."""
        self.check_sizes()
        for name, record in self.manifest.files.items():
            if sha256_of(self.path / name) != record.sha256:
                raise BundleError(
                    f"{self.path / name} was changed after the export (its checksum differs)",
                    hint="export it again",
                )

    def tensors(self, component: str) -> Tensors:
        """The weights of one component."""
        return Tensors(self.path / self.manifest.component(component).weights)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that travels with the bundle."""
        rules = self.vlm.prompts
        return Tokenizer.open(self.path / TOKENIZER, rules.sentencepiece)


def read_manifest(file: Path) -> Manifest:
    """A manifest. Raises BundleError if it is damaged or of another format."""
    try:
        data = read_json(file, ours=True)
        if data.get("format") != FORMAT:
            raise BundleError(
                f"{file} has format {data.get('format')!r:.80}, this version reads {FORMAT}",
                hint="export the model again with this version",
            )
        stated = {key: value for key, value in data.items() if key != sealed.SEAL}
        manifest = from_plain(Manifest, stated, str(file))
        sealed.opened(data, str(file))
        if manifest.dtype not in DTYPES:
            raise ConfigError(f"{file}: dtype = {manifest.dtype!r}, expected one of {DTYPES}")
        return manifest
    except ConfigError as odd:
        raise BundleError(odd.message, hint=_CHANGED) from None


def check_parts(
    where: str,
    model: Model,
    records: Sequence[ComponentRecord],
    connections: Sequence[Edge],
    files: Mapping[str, FileRecord],
) -> None:
    """Raise ConfigError unless records and connections are the model's, with listed weights."""
    try:
        declared = components(model)
    except (ArithmeticError, LookupError, TypeError, ValueError) as odd:
        raise ConfigError(f"{where}: there is no model of this configuration ({odd})") from None
    expected, recorded = [component.name for component in declared], [r.name for r in records]
    if recorded != expected:
        raise ConfigError(f"{where}: components are {recorded}, the model's are {expected}")
    for component, record in zip(declared, records, strict=True):
        if (component.inputs, component.outputs) != (record.inputs, record.outputs):
            raise ConfigError(f"{where}: the ports of {component.name} are not those of its model")
    if tuple(connections) != edges(model):
        raise ConfigError(f"{where}: edges do not connect the components of its model")
    without_rule = [
        encoder.name for encoder in model.encoders if encoder.name not in model.images.encoders
    ]
    if without_rule:
        raise ConfigError(f"{where}: images.encoders lacks {without_rule[0]}")
    check_names(where, files)
    unlisted = [record.weights for record in records if record.weights not in files]
    if unlisted:
        raise ConfigError(f"{where}: files lacks {unlisted[0]}")
    outside = [record.graph for record in records if not is_plain(record.graph)]
    if outside:
        raise ConfigError(f"{where}: a graph is {outside[0]!r:.200}, outside the folder")


def check_graphs(
    where: str, records: Sequence[ComponentRecord], files: Mapping[str, FileRecord]
) -> None:
    """Raise ConfigError for a graph that is not among the files."""
    for record in records:
        if record.graph not in files:
            raise ConfigError(f"{where}: files lacks {record.graph}")


def check_names(where: str, files: Mapping[str, FileRecord]) -> None:
    """Raise ConfigError for a name that leads out of the folder, or an impossible size."""
    for name, record in files.items():
        if not is_plain(name):
            raise ConfigError(f"{where}: files names {name!r:.200}, outside the folder")
        if record.nbytes < 0:
            raise ConfigError(f"{where}: {name} has {record.nbytes} bytes")


def size_fault(folder: Path, name: str, record: FileRecord, stated_by: str) -> str | None:
    """What is wrong with a file without reading it, as text; None if nothing is."""
    fault = inside.fault(folder, name)
    if fault:
        return f"{folder} {fault}"
    found = (folder / name).stat().st_size
    if found != record.nbytes:
        return f"{folder / name} has {found} bytes, {stated_by} says {record.nbytes}"
    return None
