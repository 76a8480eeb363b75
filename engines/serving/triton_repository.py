"""What `deploy triton` writes: a model repository around an engine, and how to start and ask it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.engines.backends import sessions
from edgevlm.engines.manifest import DESCRIPTION, Engine
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.engines.serving import batch_parts, triton_readme
from edgevlm.engines.serving.triton_readme import Facts
from edgevlm.engines.serving.work import CHAT, EMBEDDINGS
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.target import CUDA, load_onnxruntime
from edgevlm.toolkit.vlm.components import EMBEDDING
from edgevlm.toolkit.vlm.towers import TowerConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENGINE = "engine"
_BACKEND = "edgevlm.engines.serving.triton_backend"
_CPU = "onnxruntime"
_TEXTS, _ONE = "[ -1 ]", "[ 1 ]"
_OPTIONAL = {
    "image": ("TYPE_STRING", _TEXTS),
    "max_tokens": ("TYPE_INT32", _ONE),
    "temperature": ("TYPE_FP32", _ONE),
    "top_p": ("TYPE_FP32", _ONE),
    "top_k": ("TYPE_INT32", _ONE),
    "seed": ("TYPE_INT64", _ONE),
    "stop": ("TYPE_STRING", _TEXTS),
    "stream": ("TYPE_BOOL", _ONE),
}
_OUTPUTS = {
    "text": ("TYPE_STRING", _ONE),
    "token_ids": ("TYPE_INT32", _TEXTS),
    "finish_reason": ("TYPE_STRING", _ONE),
    "prompt_tokens": ("TYPE_INT32", _ONE),
}


@dataclass(frozen=True)
class Repository:
    """name: of the model. slots: answers, or images of a tower, at a time; instances: processes,
    each with the engine; threads: of an instance, 0 for all; reference: whether the engine stays
    where it is, and is found by its path, instead of being copied.
    """

    name: str
    slots: int
    instances: int = 1
    threads: int = 0
    reference: bool = False


def write(source: Path, engine: Engine, out: Path, asked: Repository) -> list[Path]:
    """Write models, README.md and requirements.txt into the folder `out`; returns the files that
    are to be read. Raises ConfigError or InputError for what cannot be served so.
    """
    models, model = out / "models", engine.parsed_model()
    folder = models / asked.name / "1"
    folder.mkdir(parents=True)
    place = str(source.resolve()) if asked.reference else _ENGINE
    if not asked.reference:
        _copy(source, engine, folder / _ENGINE)
    tower = model if isinstance(model, TowerConfig) else None
    config = _config(asked, engine, tower, place)
    files = {
        folder.parent / "config.pbtxt": config,
        folder / "model.py": _MODEL.format(
            backend=_BACKEND, kind="Answers" if tower is None else "Embeddings"
        ),
        out / "requirements.txt": f"edgevlm[{_extra(engine)}]\n",
    }
    plain = None
    if tower is not None and not _why_not_plain(engine):
        plain = f"{asked.name}_pixels"
        config = _plain_config(plain, asked, engine, tower)
        files[models / plain / "config.pbtxt"] = config
        _plain(source, engine, models / plain / "1")
    files[out / "README.md"] = triton_readme.text(
        Facts(
            asked.name,
            CHAT if tower is None else EMBEDDINGS,
            str(out.resolve()),
            engine.target,
            engine.parsed_target().on_card,
            0 if tower is None else tower.channels,
            (0, 0) if tower is None else tower.pixels,
            plain,
            _why_not_plain(engine),
            place if asked.reference else None,
        )
    )
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return list(files)


def check(engine: Engine, asked: Repository) -> None:
    """Raise ConfigError for a name or a number that Triton could not use, and InputError for an
    engine whose answers would lose something.
    """
    if not _NAME.fullmatch(asked.name):
        raise ConfigError(
            f"--name {asked.name!r:.80} cannot be a folder of a model repository",
            hint="letters, digits, dots, - and _",
        )
    model = engine.parsed_model()
    if not isinstance(model, TowerConfig):
        batch_parts.require_text_alone(model.segmenter is not None, "deploy triton")
    if not engine.verified:
        raise ConfigError(
            "the engine was never compared with the reference",
            hint="on the machine that has its card: edgevlm verify ENGINE",
        )


def _copy(source: Path, engine: Engine, folder: Path) -> None:
    """The engine's own files, and no other ones that lie beside them."""
    folder.mkdir()
    for name in (DESCRIPTION, *engine.files):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)


def _config(asked: Repository, engine: Engine, tower: TowerConfig | None, place: str) -> str:
    """config.pbtxt of the model that answers from prompts, or embeds from files of images."""
    inputs = [_port("prompt", "TYPE_STRING", _ONE)]
    inputs += [_port(name, *kind, optional=True) for name, kind in _OPTIONAL.items()]
    outputs = [_port(name, *kind) for name, kind in _OUTPUTS.items()]
    # The scheduler batches answers by itself, token by token.
    policy, most = "model_transaction_policy { decoupled: true }", 0
    if tower is not None:
        inputs = [_port("image", "TYPE_STRING", _ONE)]
        outputs = [_port(EMBEDDING, "TYPE_FP32", f"[ {tower.channels} ]")]
        policy, most = "dynamic_batching { max_queue_delay_microseconds: 2000 }", asked.slots
    parameters = {"engine": place, "slots": str(asked.slots), "threads": str(asked.threads)}
    return "\n".join(
        [
            f"name: {_text(asked.name)}",
            'backend: "python"',
            f"max_batch_size: {most}",
            f"input [\n{_joined(inputs)}\n]",
            f"output [\n{_joined(outputs)}\n]",
            policy,
            _instances(asked.instances, engine),
            *(
                f"parameters {{ key: {_text(key)} value: {{ string_value: {_text(value)} }} }}"
                for key, value in parameters.items()
            ),
            "",
        ]
    )


def _plain_config(name: str, asked: Repository, engine: Engine, tower: TowerConfig) -> str:
    """config.pbtxt of the tower's graph as it is, for Triton's ONNX Runtime backend."""
    height, width = tower.pixels
    pixels = _port("pixels", "TYPE_FP32", f"[ 3, {height}, {width} ]")
    channels = _port(EMBEDDING, "TYPE_FP32", f"[ {tower.channels} ]")
    lines = [
        f"name: {_text(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {asked.slots}",
        f"input [\n{pixels}\n]",
        f"output [\n{channels}\n]",
        "dynamic_batching { max_queue_delay_microseconds: 2000 }",
        _instances(asked.instances, engine),
        "",
    ]
    return "\n".join(lines)


def _port(name: str, kind: str, dims: str, *, optional: bool = False) -> str:
    more = " optional: true" if optional else ""
    return f"  {{ name: {_text(name)} data_type: {kind} dims: {dims}{more} }}"


def _joined(ports: list[str]) -> str:
    return ",\n".join(ports)


def _instances(count: int, engine: Engine) -> str:
    on_card = engine.parsed_target().on_card
    kind = "kind: KIND_GPU gpus: [ 0 ]" if on_card else "kind: KIND_CPU"
    return f"instance_group [ {{ count: {count} {kind} }} ]"


def _text(value: str) -> str:
    """A string of protobuf's text format; every byte that is no plain letter by its number."""
    plain = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b"\"\\'" else f"\\{byte:03o}"
        for byte in value.encode()
    )
    return f'"{plain}"'


def _extra(engine: Engine) -> str:
    """The extra of edgevlm that runs the engine."""
    target = engine.parsed_target()
    known = {_CPU: "cpu", CUDA: "gpu", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
    return known.get(target.backend, "cpu")


# -- the tower's graph without our code ----------------------------------------------------------


def _why_not_plain(engine: Engine) -> str:
    """Why Triton's own ONNX Runtime backend cannot run the tower; "" if it can."""
    target = engine.parsed_target()
    if target.backend not in (_CPU, CUDA):
        return f"the engine is one of {target.backend}, and has no graph for ONNX Runtime"
    if engine.plan.precisions:
        return (
            "the engine computes in 8 or 4 bits, which are right on some processors only with an "
            "option of ONNX Runtime that Triton does not hand on"
        )
    return ""


def _plain(source: Path, engine: Engine, folder: Path) -> None:
    """The graph and its weights, tried with ONNX Runtime alone.

    Raises ConfigError if that does not give the embeddings that the engine gives.
    """
    (record,) = engine.components
    folder.mkdir(parents=True)
    shutil.copyfile(source / record.graph, folder / "model.onnx")
    shutil.copyfile(source / record.weights, folder / record.weights)
    if engine.parsed_target().backend == CUDA:
        return  # which needs the card; the graph is the engine's own
    load_onnxruntime()
    session = sessions.open_session(folder / "model.onnx")
    with Embedder.open(source, batch=1) as tower:
        shape = (1, 3, *tower.model.pixels)
        pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        (found,) = session.run([EMBEDDING], {"pixels": pixels})
        expected = tower.run(pixels)
    if not np.allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max())):
        raise ConfigError("the graph alone gives other embeddings than the engine")


_MODEL = '''\
"""The engine beside this file; written by `edgevlm deploy triton`."""

import triton_python_backend_utils as pb_utils

from {backend} import {kind}


class TritonPythonModel({kind}):
    utils = pb_utils
'''
