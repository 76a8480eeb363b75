"""Tier 5: the verbs on a tiny model, their JSON contract, and what they leave on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import cli
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from tests.conftest import HERE

GOLDEN = HERE / "goldens/e2e_llava15"
CHECKPOINT, IMAGE = GOLDEN / "llava-v1.5-tiny", GOLDEN / "image.png"


class Shell:
    """Runs verbs in this process and keeps what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._patch = patch
        self.errors = ""

    def __call__(self, *words: object, code: int = 0) -> str:
        self._patch.setattr(sys, "argv", ["edgevlm", *map(str, words)])
        found = cli._guarded(debug=False)
        out, self.errors = self._capsys.readouterr()
        assert found == code, self.errors
        return out

    def json(self, *words: object) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capsys, monkeypatch)


def made(shell: Shell, work: Path) -> tuple[Path, Path]:
    bundle, engine = work / "bundle", work / "engine"
    shell("export", CHECKPOINT, bundle)
    shell("build", bundle, engine)
    return bundle, engine


def test_the_main_job_is_token_exact(shell: Shell, tmp_path: Path) -> None:
    _, engine = made(shell, tmp_path)
    case = json.loads((GOLDEN / "case.json").read_text())
    answer = shell.json(
        "run", engine, case["prompt"], "--image", IMAGE, "--template", "none", "--max-tokens", 24
    )
    expected = np.load(GOLDEN / "outputs.npz")["greedy_ids"].tolist()
    assert answer["token_ids"] == expected
    keys = "text token_ids prompt_tokens image_tokens finish_reason timings_ms "
    keys += "output_token_throughput peak_rss_mb"
    assert set(keys.split()) <= set(answer)
    stages = "image_decode preprocess encoder.clip merger prefill time_to_first_token "
    stages += "inter_token_latency total"
    assert set(stages.split()) <= set(answer["timings_ms"])
    assert (answer["image_tokens"], answer["prompt_tokens"]) == (36, 81)
    assert answer["finish_reason"] == "length"


def test_the_answer_streams_and_ends_with_its_figures(shell: Shell, tmp_path: Path) -> None:
    _, engine = made(shell, tmp_path)
    out = shell("run", engine, "What is this?", "--image", IMAGE, "--max-tokens", 6)
    assert out.endswith("\n")
    assert "first token after" in shell.errors
    assert shell("run", engine, "What?", "--max-tokens", 3, "--quiet").strip()
    assert shell.errors == ""


def test_the_same_seed_draws_the_same_answer(shell: Shell, tmp_path: Path) -> None:
    _, engine = made(shell, tmp_path)
    drawn = [
        shell.json("run", engine, "What?", "--max-tokens", 12, "--temperature", 1.5, "--seed", seed)
        for seed in (5, 5, 6)
    ]
    first, second, third = (answer["token_ids"] for answer in drawn)
    assert first == second != third


def test_no_token_comes_twice_if_the_user_says_so(shell: Shell, tmp_path: Path) -> None:
    _, engine = made(shell, tmp_path)
    asked = ("run", engine, "What?", "--max-tokens", 40)
    options = ((), ("--no-repeat-ngram", 1), ("--repetition-penalty", 0.5), ("--allow-banned",))
    plain, single, favoured, allowed = (shell.json(*asked, *more)["token_ids"] for more in options)
    assert allowed == plain  # this checkpoint bans nothing
    assert len(set(favoured)) < len(set(plain)) < len(set(single)) == len(single)
    shell(*asked, "--no-repeat-ngram", -1, code=1)
    assert "--no-repeat-ngram -1 is negative" in shell.errors


def test_many_requests_from_one_file(shell: Shell, tmp_path: Path) -> None:
    _, engine = made(shell, tmp_path)
    (tmp_path / "picture.png").write_bytes(IMAGE.read_bytes())
    requests = [
        {"prompt": "What is this?", "image": "picture.png"},
        {"prompt": "Two?", "images": ["picture.png", "picture.png"], "max_tokens": 3},
        {"prompt": "No image."},
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in requests) + "\n\n")
    answers = shell.json("run", engine, "--input", file, "--max-tokens", 5)["answers"]
    assert [a["image_tokens"] for a in answers] == [36, 72, 0]
    assert [len(a["token_ids"]) for a in answers] == [5, 3, 5]
    alone = shell.json("run", engine, "What is this?", "--image", IMAGE, "--max-tokens", 5)
    assert alone["token_ids"] == answers[0]["token_ids"]


def test_building_twice_does_the_work_once(shell: Shell, tmp_path: Path) -> None:
    bundle, engine = made(shell, tmp_path)
    stamp = (engine / "engine.json").stat().st_mtime_ns
    assert shell.json("build", bundle, engine)["already_built"] is True
    assert (engine / "engine.json").stat().st_mtime_ns == stamp
    assert "already built" in shell("build", bundle, engine)
    assert shell.json("build", bundle, engine, "--force")["already_built"] is False
    shell("build", bundle, engine, "--max-context", 200, code=1)
    assert "--force" in shell.errors
    smaller = shell.json("build", bundle, engine, "--max-context", 200, "--force")
    assert smaller["context"] == 200


def test_dry_runs_write_nothing(shell: Shell, tmp_path: Path) -> None:
    bundle, engine = tmp_path / "bundle", tmp_path / "engine"
    planned = shell.json("export", CHECKPOINT, bundle, "--dry-run")
    assert not bundle.exists()
    assert planned["written"] is False
    shell("export", CHECKPOINT, bundle)
    memory = shell.json("build", bundle, engine, "--dry-run")["memory"]
    assert not engine.exists()
    assert memory["total_bytes"] >= memory["weights_bytes"] + memory["cache_bytes"]
    stored = SafetensorsFile(bundle / "lm.safetensors")  # whose rotary tables are no parameters
    tables = sum(e.nbytes for name, e in stored.entries.items() if "rotary" in name)
    parameters = sum(c["bytes"] for c in planned["components"])
    assert memory["weights_bytes"] == parameters + tables > parameters


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_bundles_run_on_processors(shell: Shell, tmp_path: Path, dtype: str) -> None:
    bundle, engine = tmp_path / "bundle", tmp_path / "engine"
    shell("export", CHECKPOINT, bundle, "--dtype", dtype)
    stored = SafetensorsFile(bundle / "lm.safetensors")
    assert {e.dtype for n, e in stored.entries.items() if "rotary" not in n} == {dtype}
    built = shell.json("build", bundle, engine)
    assert max(built["build"]["kernel_differences"].values()) < 1e-4
    assert built["build"]["precision_losses"] == {}
    answer = shell.json("run", engine, "What is this?", "--image", IMAGE, "--max-tokens", 8)
    assert len(answer["token_ids"]) == 8
    if dtype == "fp16":  # the golden weights are exact in fp16: the answers stay the same
        shell("export", CHECKPOINT, tmp_path / "b32")
        shell("build", tmp_path / "b32", tmp_path / "e32")
        full = shell.json(
            "run", tmp_path / "e32", "What is this?", "--image", IMAGE, "--max-tokens", 8
        )
        assert answer["token_ids"] == full["token_ids"]


def test_the_bundle_runs_in_plain_onnx_runtime(shell: Shell, tmp_path: Path) -> None:
    from edgevlm.engines.backends import sessions

    bundle, _ = made(shell, tmp_path)
    for record in Bundle.open(bundle).manifest.components:
        session = sessions.open_session(bundle / record.graph)
        assert {i.name for i in session.get_inputs()} == {p.name for p in record.inputs}


def test_explain_names_what_happens_to_each_op(shell: Shell, tmp_path: Path) -> None:
    shell("export", CHECKPOINT, tmp_path / "b")
    shown = shell("build", tmp_path / "b", tmp_path / "e", "--explain")
    assert "edgevlm.CachedAttention" in shown
    assert "com.microsoft.GroupQueryAttention" in shown
    lowering = shell.json("build", tmp_path / "b", tmp_path / "e")["lowering"]
    assert {"component", "op", "count", "action", "into", "why"} <= set(lowering[0])


def test_profile_keeps_its_contract(shell: Shell, tmp_path: Path) -> None:
    _, engine = made(shell, tmp_path)
    page, events = tmp_path / "p.html", tmp_path / "trace.json"
    words = ("--runs", 2, "--max-tokens", 4, "--prompt-tokens", 8)
    found = shell.json("profile", engine, *words, "--html", page, "--trace", events, "--layers", 3)
    keys = "stages time_to_first_token_ms inter_token_latency_ms output_token_throughput "
    keys += "prefill_tokens_per_s load_ms peak_rss_mb roofline device samples"
    assert set(keys.split()) <= set(found)
    spread = found["stages"]["encoder.clip"]
    assert spread["p50_ms"] <= spread["p90_ms"] <= spread["p99_ms"]
    assert set(spread) == {"p50_ms", "p90_ms", "p99_ms", "mean_ms"}
    assert len(found["samples"]["prefill"]) == 2
    assert len(found["samples"]["decode"]) == 2 * 3
    first = found["metrics"]["time_to_first_token"]
    assert (first["p50"], first["count"]) == (
        pytest.approx(found["time_to_first_token_ms"], abs=1e-2),
        2,
    )
    assert found["metrics"]["decode"]["count"] == 2 * 3
    marks = [name for _, name in found["memory_marks"]]
    assert marks == ["opening", "warm-up", "run 1", "run 2", "limits"]
    files = sum(file.stat().st_size for file in engine.iterdir())
    assert found["size_bytes"] == files - (engine / "engine.json").stat().st_size
    assert found["context"]["versions"]["onnxruntime"]
    assert found["drift"] is None
    bounds = {b["stage"]: b for b in found["roofline"]["stages"]}
    assert set(bounds) == {"encoder.clip", "merger", "prefill", "decode"}
    assert all(b["floor_ms"] > 0 for b in bounds.values())
    assert "<svg" in page.read_text()
    assert {e["name"] for e in json.loads(events.read_text())["traceEvents"]} >= set(bounds)
    written = tmp_path / "p.csv"
    shown = shell("profile", engine, *words, "--compare", engine, "--csv", written)
    assert "speed of light" in shown
    assert shown.count("encoder.clip") == 2
    assert shown.splitlines()[-1].split()[4:6] == ["0", "100%"]  # drift of the engine from itself
    assert written.read_text().count(",time_to_first_token,ms,") == 2


def test_inspect_knows_every_kind_of_thing(shell: Shell, tmp_path: Path) -> None:
    bundle, engine = made(shell, tmp_path)
    saved = tmp_path / "profile.json"
    saved.write_text(shell("profile", engine, "--runs", 1, "--max-tokens", 3, "--json"))
    for path, kind in (
        (CHECKPOINT, "checkpoint"),
        (bundle, "bundle"),
        (engine, "engine"),
        (saved, "profile"),
    ):
        assert shell.json("inspect", path)["kind"] == kind
        assert kind in shell("inspect", path)


def test_doctor_tells_targets_and_packages(shell: Shell) -> None:
    found = shell.json("doctor")
    assert any(t.startswith("onnxruntime@") for t in found["targets"])
    assert found["packages"]["numpy"] == np.__version__
    assert "targets here" in shell("doctor")


def test_presets_export_with_random_weights(shell: Shell, tmp_path: Path) -> None:
    planned = shell.json(
        "export", "preset:llava-1.5-7b", tmp_path / "b", "--random-weights", "--dry-run",
        "--dtype", "fp16",
    )  # fmt: skip
    sizes = {c["name"]: c["params"] for c in planned["components"]}
    assert sizes["lm"] == 6_738_415_616  # Vicuna-7B's published count
    assert not (tmp_path / "b").exists()


def test_a_bundle_for_another_target_is_checked_before_it_is_written(
    shell: Shell, tmp_path: Path
) -> None:
    shell("export", CHECKPOINT, tmp_path / "b", "--for", "cpu")
    out = shell("export", CHECKPOINT, tmp_path / "d", "--for", "jetson-orin-nano")
    assert "before 10.15: simpler ops; the cache is copied" in out
    out = shell(
        "export", CHECKPOINT, tmp_path / "e", "--for", "onnxruntime-cuda@1.31.1/sm_90",
        "--dtype", "fp16", "--dry-run",
    )  # fmt: skip
    assert "com.microsoft.GroupQueryAttention" in out
    shell("export", CHECKPOINT, tmp_path / "e", "--for", "onnxruntime-cuda/sm_87", code=1)
    assert "build for TensorRT, which has: --target jetson-orin-nano" in shell.errors
    card = "tensorrt@10.16/sm_75"
    shell("export", CHECKPOINT, tmp_path / "c", "--for", card, "--dtype", "bf16", code=1)
    assert f"for {card}: bf16 does not exist on sm_75" in shell.errors
    assert not (tmp_path / "c").exists()
