"""A stand-in of TensorRT or TensorRT-RTX in one release: what we use of it, and nothing else.

A name that the release lacks is an AttributeError, wrong arguments are a TypeError, and every call
is logged. Its builder parses a graph and stores it with its weights as a "plan"; its engine runs
that by ONNX Runtime in the memory of cuda_standin's card. It refuses what TensorRT would: another
release or card, a damaged plan, shapes beyond a profile, unbound or misaligned addresses, too
little memory for activations, a cache that is read where it is written before 10.15 or elsewhere
since, a plan whose plugins are not registered, and a graph whose context was changed after it was
captured. A library of plugins is a file with a model, whose functions are what its kernels do.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np

from edgevlm.engines.backends import sessions
from edgevlm.toolkit.ops.vocabulary import Array
from tests.engines.backends.tensorrt import api
from tests.engines.backends.tensorrt.api import Api
from tests.engines.backends.tensorrt.cuda_standin import World

T = TypeVar("T")
MAGIC = b"vtrt"
KINDS: dict[int, tuple[str, Any]] = {
    1: ("FLOAT", np.float32),
    10: ("HALF", np.float16),
    7: ("INT64", np.int64),
    6: ("INT32", np.int32),
}
ARENA = {"encoder": 5000, "merger": 3000, "lm": 9000, "arrange": 1000, "fused": 500}
ARENA |= {"segmenter": 5000, "fp16": 10, "int8": 10, "fp8": 10}


class Made:
    """One installed release. card: what plans are built for and run on."""

    def __init__(self, release: str, world: World | None, card: str) -> None:
        self.api, self.world, self.card = api.of(release), world or World(), card
        self.rtx = release.startswith("rtx-")
        self.version = release.removeprefix("rtx-")
        self.log: list[tuple[Any, ...]] = self.world.log
        self.capturable = True
        self.timings = 0  # of the builder
        self.enums: dict[str, Any] = {}
        self.arenas: dict[int, int] = {}  # streams that compute in memory, by its address
        self.registry: IPluginRegistry | None = None

    @property
    def bodies_yield(self) -> bool:
        """Whether the parser takes a plugin for a call that has a body too."""
        return tuple(map(int, self.version.split(".")))[:2] >= (10, 7)

    @property
    def in_place(self) -> bool:
        return self.rtx or tuple(map(int, self.version.split(".")))[:2] >= (10, 15)


class Thing:
    """Base of the classes: wraps what is in the release's API, hides what is not."""

    _made: Made

    def __setattr__(self, name: str, value: Any) -> None:
        own = type(self).__name__
        found = self._made.api.find(own, name) if type(self).__module__ == __name__ else None
        if name.startswith("_") or type(self).__module__ != __name__:
            object.__setattr__(self, name, value)
            return
        if found is None or found != ("property", True):
            raise AttributeError(f"{self._made.api.release}: {own}.{name} cannot be set")
        self._made.log.append((f"{own}.{name}=", value))
        if isinstance(getattr(type(self), name, None), property):
            setter = getattr(type(self), name).fset
            if setter is not None:
                setter(self, value)
                return
        object.__setattr__(self, f"_{name}", value)


class ILogger(Thing):
    def log(self, severity: Any, text: str) -> None:
        raise NotImplementedError


class IProfiler(Thing):
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class IPluginRegistry(Thing):
    """Creators by name, version and namespace: a function's body, b"" for what is Python."""

    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], bytes] = {}

    def load_library(self, plugin_path: str) -> object:
        import onnx

        for function in onnx.ModelProto.FromString(Path(plugin_path).read_bytes()).functions:
            key = function.name, "1", function.domain
            assert key not in self._creators, f"{key} is registered twice"
            self._creators[key] = function.SerializeToString()
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object:
        return self._creators.get((type, version, plugin_namespace))


class ParserError(Thing):
    def __init__(self, text: str, node: str) -> None:
        self._text, self._node = text, node

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return self._node


class ILayer(Thing):
    def __init__(self, node: Any, plugin: bool = False) -> None:
        self._node, self._plugin = node, plugin

    @property
    def type(self) -> Any:
        name = "ATTENTION_INPUT" if self._node.op_type == "Attention" else "SHUFFLE"
        return type("Kind", (), {"name": "PLUGIN_V3" if self._plugin else name})


class IAttention(Thing):
    def __init__(self, node: Any) -> None:
        self._node = node

    @property
    def decomposable(self) -> bool:
        return bool(self._node.metadata_props)

    @decomposable.setter
    def decomposable(self, value: bool) -> None:
        self._node.metadata_props.add(key="decomposable", value=str(value))


class IAttentionInputLayer(ILayer):
    @property
    def attention(self) -> IAttention:
        return make_thing(IAttention, self._made, self._node)


class INetworkDefinition(Thing):
    def __init__(self) -> None:
        self._graph: Any = None
        self._named = ""
        self._taken: dict[str, tuple[str, str, str]] = {}  # plugins, by the calls' names
        self._stored: frozenset[str] = frozenset()  # names of the weights in a file

    @property
    def num_layers(self) -> int:
        return len(self._graph.graph.node)

    def get_layer(self, index: int) -> ILayer:
        node = self._graph.graph.node[index]
        return make_thing(ILayer, self._made, node, node.name in self._taken)


class OnnxParser(Thing):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        assert path is not None
        self._network._graph, self._network._stored = _with_weights(Path(path))
        self._network._named = Path(path).stem
        bodies = {function.name for function in self._network._graph.functions}
        for node in self._network._graph.graph.node:
            if node.domain:
                self._call(node, node.op_type in bodies)
        return not self._errors

    def _call(self, node: Any, body: bool) -> None:
        """Take the plugin that a call names, or its body."""
        import onnx

        graph, registry = self._network._graph, self._made.registry
        own = {a.name: a.s.decode() for a in node.attribute if a.name.startswith("plugin_")}
        key = node.op_type, own.get("plugin_version", "1"), own.get("plugin_namespace", node.domain)
        found = registry._creators.get(key) if registry else None
        if found is not None and (not body or (own and self._made.bodies_yield)):
            self._network._taken[node.name] = key
            if not any(f.name == node.op_type for f in graph.functions):
                function = onnx.FunctionProto.FromString(found)
                for opset in function.opset_import:
                    opset.version = min(opset.version, graph.opset_import[0].version)
                graph.functions.append(function)
        elif not body:
            text = "Plugin not found, are the plugin name, version, and namespace correct?"
            self._errors.append(make_thing(ParserError, self._made, text, node.name))


def _with_weights(path: Path) -> tuple[Any, frozenset[str]]:
    """A graph with its weights in it, and their names; onnx itself refuses a link to them."""
    import onnx

    model, stored = onnx.load(str(path), load_external_data=False), set()
    for tensor in model.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            stored.add(tensor.name)
            span = {item.key: item.value for item in tensor.external_data}
            with (path.parent / span["location"]).open("rb") as file:
                file.seek(int(span["offset"]))
                tensor.raw_data = file.read(int(span["length"]))
            del tensor.external_data[:]
            tensor.data_location = tensor.DEFAULT
    return model, frozenset(stored)


class IOptimizationProfile(Thing):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(max)]


class ITimingCache(Thing):
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._data)


class IBuilderConfig(Thing):
    def __init__(self) -> None:
        self._profiles: list[IOptimizationProfile] = []
        self._cards: dict[int, Any] = {}
        self._cache: ITimingCache | None = None
        self._limit = 0
        self._flags: set[str] = set()

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._limit = pool_size

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        self._cards[index] = capability
        return True

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return make_thing(ITimingCache, self._made, bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        known = cache._data.decode()
        if known and not known.startswith(self._made.version):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder(Thing):
    def __init__(self, logger: ILogger) -> None:
        self._log = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return make_thing(INetworkDefinition, self._made)

    def create_builder_config(self) -> IBuilderConfig:
        return make_thing(IBuilderConfig, self._made)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return make_thing(IOptimizationProfile, self._made)

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory:
        made, stripped = self._made, _stripped(network) if "STRIP_PLAN" in config._flags else {}
        graph = network._graph.SerializeToString()
        cards = [card.name.replace("SM", "sm_") for card in config._cards.values()]
        nodes = network._graph.graph.node
        header = {
            "decomposable": sum(bool(node.metadata_props) for node in nodes),
            "attentions": sum(node.op_type == "Attention" for node in nodes),
            "version": made.version,
            "cards": cards or [made.card],
            "profiles": [profile._shapes for profile in config._profiles] or [{}],
            "graph": len(graph),
            "name": network._named,
            "limit": config._limit,
            "plugins": _libraries(made, network),
            "stripped": stripped,
        }
        assert bool(stripped) == ("REFIT_IDENTICAL" in config._flags)
        severity = made.enums["ILogger.Severity"]
        for line in (
            f"Total Weights Memory: {len(graph)} bytes",
            "Total Activation Memory: 1 bytes",
        ):
            self._log.log(severity.VERBOSE, line)
        if config._cache is not None:
            known = config._cache._data or made.version.encode()
            config._cache._data = known + f" {network._named}".encode()
        text = json.dumps(header).encode()
        return IHostMemory(MAGIC + len(text).to_bytes(4, "little") + text + graph)


def _stripped(network: INetworkDefinition) -> dict[str, str]:
    """Take the weights out of a network; what they were, by name."""
    found = {}
    for tensor in network._graph.graph.initializer:
        if tensor.name in network._stored:
            found[tensor.name] = hashlib.sha256(tensor.raw_data).hexdigest()
            tensor.raw_data = b""
    return found


def _libraries(made: Made, network: INetworkDefinition) -> list[list[str]]:
    """The plugins of a network whose library has to be there where the plan runs."""
    if made.registry is None:
        return []
    used = sorted(set(network._taken.values()))
    return [list(key) for key in used if made.registry._creators[key]]


class Runtime(Thing):
    def __init__(self, logger: ILogger) -> None:
        self._log = logger

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        return self._made.enums["EngineValidity"].INVALID, self._fault(bytes(buffer))[0]

    def _fault(self, data: bytes) -> tuple[int, str]:
        """Bits of EngineInvalidityDiagnostics, and what the log says."""
        if not data.startswith(MAGIC):
            return 32, "header.magicTag == kEXPECTED_MAGIC_TAG failed"
        header, graph = _parts(data)
        if header["version"] != self._made.version:
            return (
                1,
                f"The engine plan file is not compatible with this version {header['version']}",
            )
        if self._made.card not in header["cards"]:
            return (
                2,
                f"The engine plan file is generated on an incompatible device {header['cards']}",
            )
        if len(graph) != header["graph"]:
            return 32, "Assertion magicTag of the weights failed"
        return 0, ""

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        self._made.world.check_thread()
        data = bytes(serialized_engine)
        bits, fault = self._fault(data)
        known = self._made.registry._creators if self._made.registry else {}
        lacking = [] if bits else [k for k in _parts(data)[0]["plugins"] if tuple(k) not in known]
        if lacking:
            bits, fault = 1, f"Cannot deserialize plugin {lacking}: no IPluginCreator is registered"
        if bits:
            self._log.log(self._made.enums["ILogger.Severity"].ERROR, fault)
            return None
        return make_thing(ICudaEngine, self._made, *_parts(data), self._log)


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[4:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


class ICudaEngine(Thing):
    def __init__(self, header: dict[str, Any], graph: bytes, logger: ILogger) -> None:
        import onnx

        self._header, self._log = header, logger
        self._whole = onnx.ModelProto.FromString(graph)
        self._graph, self._missing = self._whole.graph, set(header["stripped"])
        self._inputs = {v.name: v for v in self._graph.input}
        self._outputs = {v.name: v for v in self._graph.output}
        self._model, self._session = graph, None
        self._known: dict[Any, dict[str, tuple[int, ...]]] = {}

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._header["profiles"])

    @property
    def device_memory_size_v2(self) -> int:
        return self._activations()

    def _activations(self) -> int:
        return ARENA[str(self._header["name"]).split(".")[0]]

    def get_tensor_name(self, index: int) -> str:
        return str([*self._inputs, *self._outputs][index])

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._made.enums["TensorIOMode"]
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def _value(self, name: str) -> Any:
        return (self._inputs | self._outputs)[name].type.tensor_type

    def get_tensor_dtype(self, name: str) -> Any:
        return self._made.enums["DataType"][KINDS[self._value(name).elem_type][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._static(name)

    def _static(self, name: str) -> tuple[int, ...]:
        dims = self._value(name).shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        least, most = self._header["profiles"][profile_index][name]
        return [tuple(least), tuple(least), tuple(most)]

    def create_runtime_config(self) -> IRuntimeConfig:
        return make_thing(IRuntimeConfig, self._made)

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext:
        if isinstance(strategy, IRuntimeConfig):
            assert self._made.rtx and strategy._cache is not None
            strategy._cache._data += b"k"  # a kernel that was compiled
            strategy = strategy._strategy
        assert strategy is not None and strategy.name == "USER_MANAGED"
        return make_thing(IExecutionContext, self._made, self)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        import onnxruntime

        assert not self._missing, f"an engine runs without {sorted(self._missing)[:3]}"
        if self._session is None:
            options = sessions.session_options(1)
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._session = sessions.open_session(self._model, options)
        assert self._session is not None
        names = list(self._outputs)
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def _shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of the outputs."""
        key = tuple(shapes.items())
        if key not in self._known:
            zeros = {n: np.zeros(s, self._numpy(n)) for n, s in shapes.items()}
            self._known[key] = {n: a.shape for n, a in self._run(zeros).items()}
        return self._known[key]

    def _numpy(self, name: str) -> Any:
        return KINDS[self._value(name).elem_type][1]


class Refitter(Thing):
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._log = engine, logger
        self._values: dict[str, bytes] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine._header["stripped"])

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.get_all_weights() if name not in self._values]

    def refit_cuda_engine(self) -> bool:
        """As REFIT_IDENTICAL has it: the very weights of the build."""
        engine, severity = self._engine, self._made.enums["ILogger.Severity"]
        for name, known in engine._header["stripped"].items():
            if hashlib.sha256(self._values[name]).hexdigest() != known:
                self._log.log(severity.ERROR, f"{name} is not what it was at build time")
                return False
        for tensor in engine._graph.initializer:
            tensor.raw_data = self._values.get(tensor.name, tensor.raw_data)
        engine._model, engine._missing = engine._whole.SerializeToString(), set()
        return True


class OnnxParserRefitter(Thing):
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def refit_from_file(self, model: str) -> bool:
        try:
            graph, _ = _with_weights(Path(model))
        except OSError as odd:
            self._errors.append(make_thing(ParserError, self._made, str(odd), ""))
            return False
        self._refitter._values = {t.name: t.raw_data for t in graph.graph.initializer}
        return True


class IRuntimeCache(Thing):
    def __init__(self) -> None:
        self._data = b""

    def deserialize(self, blob: bytes) -> bool:
        self._data = bytes(blob)
        return True

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._data)


class IRuntimeConfig(Thing):
    def __init__(self) -> None:
        self._strategy: Any = None
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return make_thing(IRuntimeCache, self._made)

    def set_runtime_cache(self, cache: IRuntimeCache | None = None) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self._cache


class IExecutionContext(Thing):
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile, self._changes = engine, -1, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._profiler: Any = None

    @property
    def profiler(self) -> Any:
        return self._profiler

    def _no(self, why: str) -> bool:
        self._engine._log.log(self._made.enums["ILogger.Severity"].ERROR, why)
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in self._made.world.streams
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._no(f"there is no profile {profile_index}")
        self._profile, self._shapes = profile_index, {}
        self._changes += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self._engine._header["profiles"][self._profile].get(name)
        static = self._engine._static(name)
        least, most = limits if -1 in static else (static, static)
        if len(shape) != len(most) or any(
            not a <= n <= b for n, a, b in zip(shape, least, most, strict=True)
        ):
            return self._no(f"{name} {shape} is outside profile {self._profile}: {least} {most}")
        self._shapes[name] = tuple(shape)
        self._changes += 1
        return True

    def infer_shapes(self) -> list[str]:
        return self._lacking()

    def _lacking(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        return self._engine._shapes(self._shapes)[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if memory % 256:
            return self._no(f"{name} at {memory:#x} is not aligned to 256 bytes")
        self._addresses[name] = memory
        self._changes += 1
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = memory, size
        self._changes += 1

    def is_stream_capturable(self, stream: int) -> bool:
        return self._made.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        made, engine, world = self._made, self._engine, self._made.world
        if self._lacking():
            return self._no("shapes are missing")
        shapes = self._shapes | engine._shapes(self._shapes)
        unbound = [name for name in shapes if name not in self._addresses]
        if unbound:
            return self._no(f"no address for {unbound}")
        if self._memory is None or self._memory[1] < engine._activations():
            return self._no("too little memory for activations")
        for name in (n for n in shapes if n.startswith("past.")):
            same = self._addresses[name] == self._addresses["present" + name[4:]]
            if same != made.in_place:
                return self._no(f"{name}: cache at one address {same}, wanted {made.in_place}")
        stream, (arena, nbytes) = world.streams[stream_handle], self._memory
        if stream.recording is not None and not made.capturable:
            return self._no("this cannot be captured")
        addresses, changes = dict(self._addresses), self._changes
        graph = stream.recording is not None

        def work() -> None:
            if graph and changes != self._changes:
                raise AssertionError("a graph is launched whose context has changed")
            if made.arenas.pop(arena, stream_handle) != stream_handle:
                raise AssertionError("two streams compute in the same memory")
            world.memory(arena, nbytes, card=True)[:] = 0xAB
            self._compute(shapes, addresses)

        other = made.arenas.setdefault(arena, stream_handle)
        if other != stream_handle:
            raise AssertionError("two streams compute in the same memory")
        world.enqueue(stream_handle, work)
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        arrays = {name: self._array(name, shapes[name], addresses[name]) for name in shapes}
        engine = self._engine
        outputs = engine._run({name: arrays[name].copy() for name in engine._inputs})
        for name, value in outputs.items():
            arrays[name][...] = value
        if self._profiler is not None:
            self._profiler.report_layer_time("_gemm_myl0_1", 0.5)
            self._profiler.report_layer_time("_mha_myl0_2", 1.5)

    def _array(self, name: str, shape: tuple[int, ...], address: int) -> Array:
        kind = np.dtype(self._engine._numpy(name))
        nbytes = int(np.prod(shape)) * kind.itemsize
        memory: Array = self._made.world.memory(address, nbytes, card=True).view(kind)
        return memory.reshape(shape)


CLASSES = (
    *(ILogger, IProfiler, ILayer, INetworkDefinition, OnnxParser, IOptimizationProfile),
    *(ITimingCache, IBuilderConfig, Builder, Runtime, ICudaEngine, IExecutionContext),
    *(IRuntimeConfig, IRuntimeCache, IAttention, IAttentionInputLayer),
    *(IPluginRegistry, ParserError, Refitter, OnnxParserRefitter),
)
PUBLIC = (ILogger, IProfiler, OnnxParser, Builder, Runtime, Refitter, OnnxParserRefitter)


def make_thing(kind: type[T], made: Made, *args: Any) -> T:
    """An instance that our code does not make itself."""
    thing: Any = object.__new__(_classes(made)[kind.__name__])
    kind.__init__(thing, *args)
    return cast(T, thing)


def _classes(made: Made) -> dict[str, Any]:
    known: dict[str, Any] | None = getattr(made, "_classes", None)
    if known is None:
        known = {kind.__name__: _in_release(kind, made) for kind in CLASSES}
        made._classes = known  # type: ignore[attr-defined]
    return known


def _in_release(kind: type, made: Made) -> type:
    """A class with those of its members that the release has, each of which checks its calls."""
    space: dict[str, Any] = {"_made": made, "__module__": __name__}
    for name, value in vars(kind).items():
        if name.startswith("_"):
            continue
        if made.api.find(kind.__name__, name) is None:
            space[name] = property(_absent(made, f"{kind.__name__}.{name}"))
        elif callable(value):
            space[name] = _checked(made, kind.__name__, name, value)
    if kind in PUBLIC and kind not in (ILogger, IProfiler):
        space["__init__"] = _checked(made, kind.__name__, "__init__", kind.__init__)
    return type(kind.__name__, (kind,), space)


def _absent(made: Made, name: str) -> Callable[[Any], Any]:
    def get(self: Any) -> Any:
        raise AttributeError(f"{made.api.release} has no {name}")

    return get


def _checked(made: Made, owner: str, name: str, method: Callable[..., Any]) -> Any:
    @wraps(method)
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        if type(self).__module__ == __name__:
            made.api.check_call(owner, name, len(args), keywords)
            made.log.append((f"{owner}.{name}", *args, *keywords.values()))
        return method(self, *args, **keywords)

    return call


def make(release: str, world: World | None = None, card: str = "sm_87") -> ModuleType:
    """A module like `tensorrt`; its `made` is the stand-in's own."""
    made = Made(release, world, card)
    module = ModuleType("tensorrt")
    module.__dict__.update(made=made, __version__=made.version)
    for name, members in _enums(made.api):
        made.enums[name] = enum.IntEnum(name.rpartition(".")[2], members)
        owner, _, simple = name.rpartition(".")
        if not owner:
            setattr(module, simple, made.enums[name])
    for kind in (*PUBLIC, IAttentionInputLayer, IRuntimeCache):
        if kind.__name__ in made.api.facts:
            setattr(module, kind.__name__, _classes(made)[kind.__name__])
    made.registry = make_thing(IPluginRegistry, made)
    vars(module)["get_plugin_registry"] = lambda: made.registry
    if "KernelLaunchParams" in made.api.facts:
        vars(module)["KernelLaunchParams"] = object
    return module


def plugin_module(made: Made) -> dict[str, Any]:
    """What `tensorrt.plugin` of 10.13 and newer has, as far as our plugins are defined with it.

    A plugin is known once it is registered; what NVIDIA's own Python makes of ours: tests/kernels.
    """
    defined: dict[str, set[str]] = {}

    def marking(what: str) -> Callable[[str], Callable[[T], T]]:
        def named(plugin: str) -> Callable[[T], T]:
            def decorated(function: T) -> T:
                namespace, _, name = plugin.partition("::")
                defined.setdefault(plugin, set()).add(what)
                if len(defined[plugin]) == 3:
                    assert made.registry is not None
                    made.registry._creators[name, "1", namespace] = b""
                return function

            return decorated

        return named

    kinds = ("TensorDesc", "KernelLaunchParams", "SymIntExprs")
    marks = ("register", "autotune", "aot_impl")
    return {**dict.fromkeys(kinds, object), **{mark: marking(mark) for mark in marks}}


def _enums(known: Api) -> Iterator[tuple[str, dict[str, int]]]:
    found: dict[str, dict[str, int]] = {}
    for name, (kind, about) in known.facts.items():
        if kind == "member":
            owner, _, member = name.rpartition(".")
            found.setdefault(owner, {})[member] = about
    yield from found.items()


def as_package(folder: Path, module: str, release: str, card: str, root: Path) -> dict[str, str]:
    """Write a package that is this stand-in; what the environment of a process needs to have it."""
    package = folder / module
    package.mkdir(parents=True, exist_ok=True)
    package.joinpath("__init__.py").write_text(
        "from tests.engines.backends.tensorrt import trt_standin\n"
        f"globals().update(vars(trt_standin.make({release!r}, card={card!r})))\n"
    )
    if module == "tensorrt" and "KernelLaunchParams" in api.of(release).facts:
        package.joinpath("plugin.py").write_text(
            "import tensorrt\n"
            "from tests.engines.backends.tensorrt import trt_standin\n"
            "globals().update(trt_standin.plugin_module(tensorrt.made))\n"
        )
    paths = [str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": tempfile.gettempdir()}
