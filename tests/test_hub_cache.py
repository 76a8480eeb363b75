"""Model ids, towers and artifacts in the hub's cache, whose files are links to blobs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from edgevlm import api
from edgevlm.engines.backends.common import place
from edgevlm.engines.build import build
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import CheckpointError
from tests.refusals import GOLDEN, LM, TOWER, edgevlm, refuses
from tests.systems import joined
from tests.systems import test_comm_variants as comm

MODEL_ID, TOWER_ID = "liuhaotian/llava-v1.5-7b", "openai/clip-vit-large-patch14-336"


def cached(hub: Path, model: str, files: Path, leave_out: str = "") -> Path:
    """Put a folder into a cache as huggingface_hub does; returns the snapshot."""
    root = hub / f"models--{model.replace('/', '--')}"
    revision = hashlib.sha1(model.encode()).hexdigest()
    snapshot = root / "snapshots" / revision
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs/main").write_text(revision)
    for file in files.iterdir():
        if leave_out and file.match(leave_out):
            continue
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, root / "blobs" / blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def checkpoint(folder: Path, tower: str = TOWER_ID) -> Path:
    """The tiny LLaVA-1.5, alone in a folder, which names its tower by a model id."""
    shutil.copytree(GOLDEN / LM, folder / LM)
    path = folder / LM / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mm_vision_tower": tower}))
    return folder / LM


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the model and its tower; nothing may be downloaded."""
    import huggingface_hub

    folder, whole = tmp_path / "hub", huggingface_hub.snapshot_download

    def from_cache(name: str, **given: Any) -> Any:
        assert given["local_files_only"], f"{name} was to be downloaded"
        return whole(name, **given)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.snapshot_download", from_cache)
    monkeypatch.chdir(tmp_path)
    cached(folder, MODEL_ID, checkpoint(tmp_path / "published"))
    cached(folder, TOWER_ID, GOLDEN / TOWER)
    return folder


def test_a_model_id_exports_in_one_command(hub: Path, tmp_path: Path) -> None:
    assert edgevlm("export", MODEL_ID, tmp_path / "b", "--offline", "--quiet").code == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.model["name"] == "llava-v1.5-7b"
    assert manifest.source["model_id"] == MODEL_ID
    assert manifest.source["revision"] == hashlib.sha1(MODEL_ID.encode()).hexdigest()
    assert manifest.source["tower"] == TOWER_ID
    plain = api.export_bundle(GOLDEN / LM, tmp_path / "plain").manifest
    assert {c.weights: manifest.files[c.weights] for c in manifest.components} == {
        c.weights: plain.files[c.weights] for c in plain.components
    }


def test_a_snapshot_by_its_path_has_the_models_name(hub: Path) -> None:
    (snapshot,) = hub.glob("models--liuhaotian*/snapshots/*")
    found = api.open_source(snapshot, api.read_options(offline=True))
    assert found.model.name == "llava-v1.5-7b"
    shown = json.loads(edgevlm("inspect", snapshot, "--json").out)
    assert shown["model"]["name"] == "llava-v1.5-7b"


def test_the_option_takes_an_id_and_a_folder_first(hub: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "other", "some-org/missing-tower")
    export = ("export", folder, tmp_path / "b", "--offline", "--quiet", "--dry-run")
    error, hint = refuses(tmp_path, *export)
    assert "'some-org/missing-tower' that" in error
    assert "not on this machine" in error
    assert "--vision-tower" in hint
    assert "--offline" in hint
    assert edgevlm(*export, "--vision-tower", TOWER_ID).code == 0
    assert edgevlm(*export, "--vision-tower", GOLDEN / TOWER).code == 0
    error, _ = refuses(tmp_path, *export, "--vision-tower", "some-org/none")
    assert "some-org/none is not in the local cache" in error
    shutil.copytree(GOLDEN / TOWER, tmp_path / "some-org/none")
    assert edgevlm(*export, "--vision-tower", "some-org/none").code == 0


def test_a_tower_without_weights_is_downloaded_unless_offline(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(hub, "some-org/half", GOLDEN / TOWER, leave_out="*.safetensors")
    folder = checkpoint(tmp_path / "other", "some-org/half")
    with pytest.raises(CheckpointError, match="in the local cache without its weights"):
        api.open_source(folder, api.read_options(offline=True))
    fetched: list[str] = []

    def fetch(name: str, *, local_files_only: bool, **_: object) -> str:
        (snapshot,) = hub.glob("models--some-org--half/snapshots/*")
        if not local_files_only:
            fetched.append(name)
            for file in (GOLDEN / TOWER).glob("*.safetensors"):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert api.open_source(folder, api.read_options()).model.encoders[0].kind == "clip"
    assert fetched == ["some-org/half"]


def test_the_base_of_a_part_may_be_a_model_id(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    folder.mkdir()
    shutil.copy(checkpoint(tmp_path / "other") / "config.json", folder)
    tensors = load_file(GOLDEN / LM / "model.safetensors")
    own = {key: tensor * 2 for key, tensor in tensors.items() if "mm_projector" in key}
    save_file(own, folder / "mm_projector.safetensors")
    found = api.open_source(folder, api.read_options(base=MODEL_ID, offline=True))
    assert found.origin["template"] == "vicuna_v1 ('v1' in the base's name)"
    for key in ("linears.0.weight", "linears.1.weight"):
        whole = api.open_source(GOLDEN / LM, api.read_options()).weights["merger"][key]
        np.testing.assert_array_equal(found.weights["merger"][key], 2 * whole)
    export = ("export", folder, tmp_path / "b", "--offline", "--quiet", "--dry-run", "--base")
    assert edgevlm(*export, MODEL_ID).code == 0
    error, hint = refuses(tmp_path, *export, "some-org/none")
    assert "some-org/none is not in the local cache" in error
    assert "--offline" in hint
    error, _ = refuses(tmp_path, *export, tmp_path / "nowhere")
    assert "nowhere does not exist" in error
    shutil.copytree(GOLDEN / LM, tmp_path / "some-org/none")
    assert edgevlm(*export, "some-org/none").code == 0


def test_the_folders_of_comm_may_be_model_ids(hub: Path, tmp_path: Path) -> None:
    v, lm = comm.VARIANTS["defaults"], joined.language_model("llama", vocab_size=1002)
    comm.write(tmp_path, v, *comm.towers(v), lm, comm.merger_tensors(v, lm.config.hidden_size))
    whole = tmp_path / "comm"
    ids = {name: f"some-org/{name}" for name in ("clip", "dinov2", "language_model")}
    path = whole / "config.json"
    config = json.loads(path.read_text())
    for name, model in ids.items():
        cached(hub, model, tmp_path / config[name])
        shutil.rmtree(tmp_path / config[name])
    path.write_text(json.dumps(config | ids))
    assert api.open_source(whole, api.read_options(offline=True)).model.system == "comm"
    path.write_text(json.dumps(config | ids | {"dinov2": "some-org/none"}))
    with pytest.raises(CheckpointError, match="'some-org/none', which .* names") as refused:
        api.open_source(whole, api.read_options(offline=True))
    assert "not in the local cache" in refused.value.message
    assert "--offline" in refused.value.hint


def test_inspecting_downloads_nothing(hub: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "other", "some-org/missing-tower")
    assert "not on this machine" in refuses(tmp_path, "inspect", folder)[0]


# -- bundles and engines -----------------------------------------------------------------------


@pytest.mark.parametrize("links", ["relative", "absolute"])
def test_bundles_and_engines_of_links_work(links: str, ready: Path, tmp_path: Path) -> None:
    bundle = cached(tmp_path / "hub", "org/bundle", ready / "bundle")
    engine = cached(tmp_path / "hub", "org/engine", ready / "engine-cpu")
    for file in [*bundle.iterdir(), *engine.iterdir()] if links == "absolute" else []:
        blob = file.resolve()
        file.unlink()
        file.symlink_to(blob)
    question = Question("What?", max_tokens=4)
    with Session.open(ready / "engine-cpu") as session:
        expected = session.answer(question).token_ids
    with Session.open(engine) as session:
        assert session.answer(question).token_ids == expected
    for target, precision in (("cpu", None), ("reference", None), ("cpu", "int8")):
        out = tmp_path / f"{target}-{precision}"
        api.build_engine(bundle, out, target=target, precision=precision)
        assert not [file for file in out.iterdir() if file.is_symlink()]
        with Session.open(out) as session:
            found = session.answer(question).token_ids
        assert found == expected or precision
    again = api.export_bundle(bundle, tmp_path / "again")
    assert again.manifest.model == Bundle.open(bundle).manifest.model


@pytest.mark.parametrize("precision", [None, "int8"])
def test_onnx_opens_what_is_written(precision: str | None, ready: Path, tmp_path: Path) -> None:
    """onnx.load refuses weights that are links: those of the bundle must have no second name."""
    bundle, engine = tmp_path / "bundle", tmp_path / "engine"
    shutil.copytree(ready / "bundle", bundle)
    api.build_engine(bundle, engine, precision=precision)
    for file in (*bundle.glob("*.onnx"), *engine.glob("*.onnx")):
        assert onnx.load(str(file)).graph.node
    assert all(file.stat().st_nlink == 1 for file in (*bundle.iterdir(), *engine.iterdir()))


def test_onnx_refuses_hard_links(ready: Path, tmp_path: Path) -> None:
    """The reason for the copies; once this fails, weights can be shared again."""
    shutil.copytree(ready / "bundle", tmp_path / "bundle")
    (tmp_path / "second").hardlink_to(tmp_path / "bundle/lm.safetensors")
    with pytest.raises(onnx.checker.ValidationError, match="hard link"):
        onnx.load(str(tmp_path / "bundle/lm.onnx"))


def test_a_copy_is_whole_where_the_kernel_cannot_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "blob").write_bytes(data)
    (tmp_path / "weights").symlink_to("blob")
    (tmp_path / "out").mkdir()
    place(tmp_path / "weights", tmp_path / "out/first")

    def refuse(*_: object) -> int:
        raise OSError(18, "not between these file systems")

    monkeypatch.setattr("os.copy_file_range", refuse, raising=False)
    place(tmp_path / "weights", tmp_path / "out/second")
    for name in ("first", "second"):
        assert (tmp_path / "out" / name).read_bytes() == data
        assert not (tmp_path / "out" / name).is_symlink()


def test_a_build_counts_the_weights_that_it_copies(ready: Path) -> None:
    bundle = Bundle.open(ready / "bundle")
    weights = sum(file.stat().st_size for file in bundle.path.glob("*.safetensors"))
    request = api.build_request(bundle.path)
    assert build._new_bytes(bundle, request) - weights == build._GRAPHS_BYTES
