"""Damage is found before anything is computed from it, and told; names stay in their folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.calibration.command import checked_report
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.engines.backends.onnxruntime import OnnxRuntimeRunner
from edgevlm.engines.profiling import report, tables
from edgevlm.engines.profiling.page import HEAD
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.bundle import checksums, goldens, trained
from edgevlm.toolkit.bundle.goldens import relative_difference, relative_rms
from edgevlm.toolkit.bundle.manifest import GOLDENS
from edgevlm.toolkit.checkpoints import inside
from edgevlm.toolkit.errors import AccuracyError, CheckpointError, OutputError
from tests.conftest import ROOT
from tests.refusals import ASK, GOLDEN, IMAGE, LM, edgevlm, edit, refuses
from tests.sealing import reseal


def flip(path: Path) -> None:
    """Change one bit of a large number of a file's, and neither its size nor its header."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)


# -- engines -------------------------------------------------------------------------------------


def test_a_bit_of_an_engine_is_found_when_it_is_opened(
    engine: Path, ready: Path, tmp_path: Path
) -> None:
    flip(engine / "lm.safetensors")
    for words in (("run", engine, *ASK), ("profile", engine, "--runs", 1)):
        error, hint = refuses(tmp_path, *words)
        assert f"{engine / 'lm.safetensors'} is damaged" in error
        assert hint.startswith("build it again: edgevlm build ")
    flip(engine / "tokenizer.json")
    error, hint = refuses(tmp_path, "doctor", engine)
    assert "lm.safetensors is damaged" in error
    assert "tokenizer.json is damaged" in error
    build = ("build", ready / "bundle", engine, "--quiet")
    error, hint = refuses(tmp_path, *build)
    assert (f"{engine} exists and is damaged" in error, "--force" in hint) == (True, True)
    assert edgevlm(*build, "--force").code == 0
    assert "already built" in edgevlm(*build).out
    examined = json.loads(edgevlm("doctor", engine, "--json").out)
    assert (examined["kind"], examined["problems"]) == ("examination", [])
    assert "lm.safetensors" in examined["files"]


def test_a_change_with_the_same_checksum_is_found_by_sha256(engine: Path, tmp_path: Path) -> None:
    """Somebody can make the CRC-32 right; here the description gets it."""
    flip(engine / "merger.safetensors")
    right = checksums.of_files(engine, ["merger.safetensors"], 1)
    edit(engine / "engine.json", lambda data: data["checksums"].update(right))
    assert edgevlm("run", engine, *ASK).code == 0
    for words in (("run", engine, *ASK, "--verify"), ("doctor", engine)):
        error, _ = refuses(tmp_path, *words)
        assert "merger.safetensors was changed since it was built" in error


DESCRIBED: dict[str, Callable[[dict[str, Any]], object]] = {
    "engine.json": lambda data: data.update(context=data["context"] - 1),
    "manifest.json": lambda data: data["model"]["lm"]["config"].update(eps=1e-6),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_number_of_a_description_is_found(
    name: str, engine: Path, bundle: Path, tmp_path: Path
) -> None:
    path = (engine if name == "engine.json" else bundle) / name
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data))  # indented otherwise, it is the same
    assert edgevlm("inspect", path.parent).code == 0
    DESCRIBED[name](data)
    path.write_text(json.dumps(data))
    for words in (("inspect", path.parent), ("doctor", path.parent)):
        assert f"{path} was changed after it was written" in refuses(tmp_path, *words)[0]
    del data["seal"]
    path.write_text(json.dumps(data))
    assert f"{path} lacks its seal" in refuses(tmp_path, "inspect", path.parent)[0]


def test_pieces_are_compared_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PIECE_BYTES", 1000)
    for size in (0, 1, 999, 1000, 1001, 5000):
        (tmp_path / "file").write_bytes(os.urandom(size))
        (pieces,) = checksums.of_files(tmp_path, ["file"], 2).values()
        assert len(pieces) == max(-(-size // 1000), 1)
    before = pieces
    flip(tmp_path / "file")
    (after,) = checksums.of_files(tmp_path, ["file"], 1).values()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 4 + [False]


# -- bundles and checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["build", "export", "doctor"])
def test_a_bit_of_a_bundle_is_found(verb: str, bundle: Path, tmp_path: Path) -> None:
    flip(bundle / "lm.safetensors")
    out = () if verb == "doctor" else (tmp_path / "out", "--quiet")
    error, hint = refuses(tmp_path, verb, bundle, *out)
    assert f"{bundle / 'lm.safetensors'} was changed after the export" in error
    assert "export it again" in hint


def test_a_bit_of_a_trained_checkpoint_is_found(tmp_path: Path) -> None:
    from edgevlm.toolkit import systems
    from edgevlm.toolkit.checkpoints.layouts.source import Options

    source = systems.load(GOLDEN / LM, Options())
    folder = tmp_path / "trained"
    trained.write(
        folder, source.model, source.tokenizer, source.weights, origin={}, training={},
        made_by="edgevlm tests",
    )  # fmt: skip
    assert edgevlm("doctor", folder).code == 0
    flip(folder / "model.safetensors")
    for words in (("doctor", folder), ("export", folder, tmp_path / "out", "--quiet")):
        error, _ = refuses(tmp_path, *words)
        assert f"{folder / 'model.safetensors'} was changed after it was written" in error


# -- values that are no numbers ------------------------------------------------------------------


@pytest.mark.parametrize(("component", "word"), [("lm", "logits"), ("encoder.clip", "features.0")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_naming_its_component(
    component: str, word: str, value: float, ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value among many, where no maximum would show it."""
    run = OnnxRuntimeRunner.run

    def damaged(self: Any, *given: Any) -> dict[str, Any]:
        outputs = run(self, *given)
        if self._record.name == component:
            outputs[word] = outputs[word].copy()
            if outputs[word].size:
                outputs[word][..., -1] = value
        return outputs

    monkeypatch.setattr(OnnxRuntimeRunner, "run", damaged)
    with (
        Session.open(ready / "engine-cpu", threads=1) as session,
        pytest.raises(AccuracyError, match=rf"^{component} computed {word} that are NaN"),
    ):
        session.answer(Question("What?", [str(IMAGE)], 2))


def test_the_next_answer_does_not_suffer(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that such values were computed in is not used again."""
    run, calls = OnnxRuntimeRunner.run, list[bool]()  # whether a call goes wrong, from the last on

    def once(self: Any, inputs: Any, state: Any = None) -> dict[str, Any]:
        outputs = run(self, inputs, state)
        if calls and calls.pop():
            for array in (*outputs.values(), *state.arrays.values()):
                array[:] = np.nan
        return outputs

    question = Question("What?", (), 4)
    with Session.open(ready / "engine-cpu", threads=1, replies=1) as session:
        expected = session.answer(question).token_ids
        monkeypatch.setattr(OnnxRuntimeRunner, "run", once)
        for _ in range(2):
            calls += [True, False]
            with pytest.raises(AccuracyError, match="NaN"):
                session.answer(question)
            assert session.answer(question).token_ids == expected


@pytest.mark.parametrize("where", [0, -1])
def test_a_golden_that_is_no_number_is_refused(where: int, bundle: Path, tmp_path: Path) -> None:
    path = bundle / GOLDENS
    calls = goldens.load(path)
    calls[where].outputs[next(iter(calls[where].outputs))][3] = np.nan
    goldens.save(path, calls)
    reseal(bundle / "manifest.json")
    error, _ = refuses(tmp_path, "build", bundle, tmp_path / "e", "--quiet")
    assert f"{path} holds no goldens: a value is NaN or infinite" in error


def test_no_error_is_smaller_for_a_value_that_is_no_number() -> None:
    good, odd = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    for actual, expected in ((good, odd), (odd, good), (odd, odd)):
        assert relative_difference(actual, expected) == np.inf
        assert relative_rms([(good, good), (actual, expected)]) == np.inf


def _saved(path: Path, ids: Any) -> None:
    """Goldens with one array."""
    arrays: dict[str, Any] = {"00|lm|in|ids": ids}
    np.savez(path, **arrays)


GOLDENS_OF_OTHERS: dict[str, Callable[[Path], object]] = {
    "no archive": lambda path: path.write_bytes(b"PK" + bytes(99)),
    "other names": lambda path: np.savez(path, a=np.ones(3)),
    "none of a component": lambda path: _saved(path, np.ones((1, 3), int)),
    "objects": lambda path: _saved(path, np.array([{}], object)),
}


@pytest.mark.parametrize("kind", GOLDENS_OF_OTHERS)
def test_goldens_that_export_did_not_write_are_refused(
    kind: str, bundle: Path, tmp_path: Path
) -> None:
    GOLDENS_OF_OTHERS[kind](bundle / GOLDENS)
    reseal(bundle / "manifest.json")
    error, hint = refuses(tmp_path, "build", bundle, tmp_path / "e", "--quiet")
    assert "goldens" in error
    assert "export the bundle again" in hint


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b",
                                  "\ud800", "x" * 256])  # fmt: skip
def test_a_name_that_is_no_entry_of_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    assert not inside.is_plain(name)
    assert "no file of its folder" in (inside.fault(tmp_path, name) or "")


def test_links_stay_in_their_folder_or_the_hubs(tmp_path: Path) -> None:
    home = tmp_path / "repository/snapshots/revision"
    blobs = tmp_path / "repository/blobs"
    for folder in (home, blobs):
        folder.mkdir(parents=True)
    for path in (home / "file", blobs / "0f", tmp_path / "secret"):
        path.touch()
    links = {"near": "file", "of the hub": "../../blobs/0f", "absolute": str(blobs / "0f")}
    bad = {"away": str(tmp_path / "secret"), "circle": "circle", "gone": "gone too"}
    bad["device"] = "/dev/zero"
    for name, target in (links | bad).items():
        (home / name).symlink_to(target)
    os.mkfifo(home / "pipe")
    (home / "folder").mkdir()
    assert [name for name in links if inside.fault(home, name)] == []
    for name in (*bad, "pipe", "folder", "missing"):
        assert inside.fault(home, name), name


def test_an_engines_link_that_leaves_it_is_refused(engine: Path, tmp_path: Path) -> None:
    (engine / "lm.safetensors").rename(tmp_path / "elsewhere")
    (engine / "lm.safetensors").symlink_to(tmp_path / "elsewhere")
    error, _ = refuses(tmp_path, "run", engine, *ASK)
    assert "has lm.safetensors as a link that leaves the folder" in error


def test_a_graph_that_reads_another_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    import onnx

    shutil.copy(bundle / "lm.safetensors", tmp_path / "secret")
    for place, offset in (("../secret", None), ("lm.safetensors", "3"), ("", None)):
        model = onnx.load(str(bundle / "lm.onnx"), load_external_data=False)
        for tensor in model.graph.initializer:
            for item in tensor.external_data:
                changed = {"location": place, "offset": offset}.get(item.key)
                item.value = item.value if changed is None else changed
        (bundle / "lm.onnx").write_bytes(model.SerializeToString())
        reseal(bundle / "manifest.json")
        error, _ = refuses(tmp_path, "build", bundle, tmp_path / "e", "--quiet")
        assert f"{bundle / 'lm.onnx'} is not as export writes it" in error


# -- what is replaced ----------------------------------------------------------------------------


def test_a_report_replaces_only_a_report(tmp_path: Path) -> None:
    theirs = {
        "html": "<!doctype html><title>thesis</title>",
        "trace": '{"thesis": 1}',
        "csv": "thesis,1\n",
        "markdown": "# Thesis\n",
    }
    files = {name: tmp_path / name for name in theirs}
    for name, text in theirs.items():
        files[name].write_text(text)
        with pytest.raises(OutputError, match="is no such report of ours"):
            report.check_files(0, report.Files(**{name: files[name]}))
    ours = {
        "html": HEAD + "more",
        "trace": tables.TRACE_BEGINS + ', "traceEvents": []}',
        "csv": tables.CSV_BEGINS + ",mean\n",
        "markdown": tables.MARKDOWN_BEGINS + "\n",
    }
    for texts in (ours, dict.fromkeys(ours, "")):
        for name, text in texts.items():
            files[name].write_text(text)
        report.check_files(0, report.Files(**files))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked")
def test_no_kill_loses_an_artifact() -> None:
    """Every step of each way to replace a folder, and some moments by chance."""
    command = [sys.executable, "-m", "tests.fuzz.kills", "9"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "HARM" not in done.stdout
    assert "renamed: steps" in done.stdout


# -- what calibration and training keep ----------------------------------------------------------


def kept_sums(folder: Path) -> Unfinished:
    """A calibration at work in `folder`, with the same settings each time."""
    kept = Unfinished(folder, "tests")
    kept.begin(lambda message: None, "settings")
    return kept


def test_damaged_sums_are_found_again(tmp_path: Path) -> None:
    kept = kept_sums(tmp_path / "kept")
    kept.put("ranges", {"x": np.arange(5.0)})
    kept.close(remove=False)
    said: list[str] = []
    again = Unfinished(tmp_path / "kept", "tests")
    again.begin(said.append, "settings")
    assert again.get("ranges")["x"].tolist() == [0, 1, 2, 3, 4]
    again.close(remove=False)
    flip(tmp_path / "kept/ranges.safetensors")
    again = Unfinished(tmp_path / "kept", "tests")
    again.begin(said.append, "settings")
    assert not again.has("ranges")
    assert "ranges.safetensors is damaged (its CRC-32 differs); it is computed again" in said[-1]
    again.close(remove=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["thesis.txt", "lock", "key"])
def test_a_folder_of_somebody_else_is_no_place_for_sums(name: str, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / name).write_text("years of work")
    with pytest.raises(OutputError, match="holds what we did not write"):
        kept_sums(tmp_path / "kept")
    assert (tmp_path / "kept" / name).read_text() == "years of work"


def test_a_calibrations_report_replaces_only_a_report(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert checked_report(None) is None
    assert checked_report(file) == file
    for text, ours in (('{"kind": "calibration"}', True), ('{"kind": "x"}', False), ("x", False)):
        file.write_text(text)
        if ours:
            assert checked_report(file) == file
            continue
        with pytest.raises(OutputError, match="is no report of ours"):
            checked_report(file)
    with pytest.raises(OutputError, match="cannot be written"):
        checked_report(tmp_path / "nowhere/report.json")


class Accelerator:
    """Of one process, whose state is some bytes."""

    is_main_process = True

    def wait_for_everyone(self) -> None:
        """There is nobody else."""

    def save_state(self, folder: str) -> None:
        (Path(folder) / "model.safetensors").write_bytes(bytes(range(256)) * 9)


@pytest.mark.parametrize("name", ["model.safetensors", "run.json"])
def test_a_damaged_state_of_training_is_not_resumed(name: str, tmp_path: Path) -> None:
    from edgevlm.training import states
    from edgevlm.training.loop import Progress

    accelerator: Any = Accelerator()
    states.save(accelerator, tmp_path, Progress(3, 24, 100), {"stage": "s"})
    path = tmp_path / "states/step-000003" / name
    assert states._read(path.parent) == ({"stage": "s"}, Progress(3, 24, 100))
    path.write_bytes(path.read_bytes().replace(b"24", b"25").replace(b"\x05", b"\x06"))
    with pytest.raises(CheckpointError, match=f"{name}.*(damaged|was changed)") as refused:
        states.resume(accelerator, tmp_path, Progress(), {"stage": "s"})
    assert "remove that folder; 0 earlier state(s) are left" in refused.value.hint


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    from edgevlm.training.run import Home

    parts: Any = (tmp_path, False, None, {}, "tests", print, True)
    first, second = Home(*parts), Home(*parts)
    first.hold()
    with pytest.raises(OutputError, match="another run is at work"):
        second.hold()
    first.let_go()
    second.hold()
    second.let_go()
