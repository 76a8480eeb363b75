"""`edgevlm batch`: every request in a part, parts whole or absent, the rest done after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from edgevlm import cli
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving import batch_parts, ray_data
from edgevlm.engines.serving.ray_data import Cluster
from edgevlm.toolkit.errors import ConfigError, InputError, MissingExtra, OutputError, ToolkitError
from tests.conftest import ROOT

TOKENS = 6


def batch(*words: object) -> None:
    cli.app(["batch", *map(str, words), "--threads", "1", "--quiet"], standalone_mode=False)


def rows(out: Path) -> list[dict[str, Any]]:
    """Every row of a job's parts, in order."""
    files = sorted((out / "parts").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "parts").iterdir())}


@pytest.fixture
def mixed(photos: list[Path]) -> Path:
    """A folder with a picture that is none."""
    (photos[0].parent / "3b.jpg").write_bytes(b"no picture")
    return photos[0].parent


@pytest.fixture
def requests(photos: list[Path]) -> Path:
    """A file of requests, two of which cannot be answered."""
    lines: list[Any] = [
        {"prompt": f"What is number {n}?", "image": file.name, "id": {"n": n}}
        for n, file in enumerate(photos)
    ]
    lines[2] |= {"max_tokens": 3, "stop": ["zz"]}
    lines[4] = {"image": "0.png"}
    lines[5]["image"] = "missing.png"
    lines.append({"messages": [{"role": "user", "content": "Why?"}]})
    file = photos[0].parent / "requests.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def expected(engine: Path, requests: Path) -> list[str | None]:
    """What a session answers that does nothing else."""
    found = list[str | None]()
    with Session.open(engine, threads=1) as session:
        for line in requests.read_text().splitlines():
            data = json.loads(line)
            prompt = data.get("prompt") or ("Why?" if "messages" in data else None)
            images = [requests.parent / data["image"]] if "image" in data else []
            if prompt is None or not all(image.exists() for image in images):
                found.append(None)
                continue
            tokens, stop = data.get("max_tokens", TOKENS), data.get("stop", ())
            found.append(session.answer(Question(prompt, images, tokens, stop=stop)).text)
    return found


def test_requests_are_answered_in_parts(
    engine: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job"
    batch(engine, requests, out, "--max-tokens", TOKENS, "--part", 3, "--slots", 2, "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["requests"], told["parts"], told["failed"]) == (8, 3, 2)
    assert [name for name, _ in told["failures"]] == ["line 5", "line 6 ({'n': 5})"]
    found = rows(out)
    assert [row["line"] for row in found] == list(range(1, 9))
    assert [row["text"] for row in found] == expected(engine, requests)
    assert found[0]["id"] == {"n": 0}
    assert "missing.png" in found[5]["error"]
    assert found[5]["token_ids"] is None
    assert (out / "parts/part-00001.jsonl").exists()


def test_strict_answers_are_those_of_run(rounded: Path, requests: Path, tmp_path: Path) -> None:
    batch(rounded, requests, tmp_path / "job", "--max-tokens", TOKENS, "--strict")
    assert [row["text"] for row in rows(tmp_path / "job")] == expected(rounded, requests)


def test_a_folder_is_asked_one_question(engine: Path, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "job"
    batch(engine, mixed, out, "--prompt", "What?", "--max-tokens", 4, "--format", "parquet")
    table = pq.read_table(out / "parts").to_pydict()
    assert [Path(name).name for name in table["id"]][3:5] == ["3.png", "3b.jpg"]
    assert table["text"][4] is None and "not an image" in table["error"][4]
    with Session.open(engine, threads=1) as session:
        for number in (0, 5):
            image = table["images"][number][0]
            answer = session.answer(Question("What?", image, 4))
            assert table["text"][number] == answer.text
            assert tuple(table["token_ids"][number]) == answer.token_ids


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_embeddings_are_those_of_the_verb(
    form: str, tower: Path, mixed: Path, tmp_path: Path
) -> None:
    features, out = tmp_path / "features.npz", tmp_path / "job"
    words = ["embed", str(tower), str(mixed), "-o", str(features), "--normalize", "-q"]
    cli.app([*words, "--threads", "1"], standalone_mode=False)
    batch(tower, mixed, out, "--normalize", "--part", 4, "--format", form)
    if form == "parquet":
        table = pq.read_table(out / "parts").to_pydict()
        files, vectors = table["file"], table["embedding"]
    else:
        found = rows(out)
        files, vectors = ([row[name] for row in found] for name in ("file", "embedding"))
    good = [number for number, vector in enumerate(vectors) if vector is not None]
    with np.load(features) as whole:
        assert [files[number] for number in good] == whole["files"].tolist()
        assert np.array_equal(
            np.asarray([vectors[number] for number in good], np.float32), whole["embeddings"]
        )
    assert Path(files[4]).name == "3b.jpg" and vectors[4] is None


def test_finished_parts_are_not_computed_again(
    tower: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, out = tmp_path / "list.txt", tmp_path / "job"
    listed.write_text("\n".join(map(str, photos)))
    batch(tower, listed, out, "--part", 2)
    whole = contents(out)
    assert len(whole) == 4
    for name in ("done/00001.json", "parts/part-00001.jsonl", "done/00003.json"):
        (out / name).unlink()
    (out / "parts/.part-00001.jsonl.killed").write_bytes(b"half")
    kept = (out / "parts/part-00000.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    batch(tower, listed, out, "--part", 2, "--json")
    assert json.loads(capsys.readouterr().out)["resumed_parts"] == 2
    assert contents(out) == whole
    assert (out / "parts/part-00000.jsonl").stat().st_mtime_ns == kept
    with pytest.raises(OutputError, match="another job: settings differ"):
        batch(tower, listed, out, "--part", 3)
    listed.write_text("\n".join(map(str, photos[1:])))
    with pytest.raises(OutputError, match="another job: requests, inputs differ"):
        batch(tower, listed, out, "--part", 2)


# A job that is killed when rows are in their place, and what says that they are finished is not.
KILLED = """
import os, signal, sys
from edgevlm import cli
replace = os.replace
def killing(new, file):
    if str(file).endswith("done/00003.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(new, file)
os.replace = killing
cli.main()
"""


def test_a_job_that_is_killed_goes_on(engine: Path, photos: list[Path], tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"Tell me {n}", "max_tokens": 30}) for n in range(40)]
    file, out = tmp_path / "many.jsonl", tmp_path / "job"
    file.write_text("\n".join(lines))
    words = (engine, file, out, "--part", 2, "--slots", 2)
    command = [sys.executable, "-c", KILLED, "batch", *map(str, words), "--threads", "1"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(out.glob("done/*.json"))) == 3
    assert len(contents(out)) == 4
    batch(*words)
    whole = contents(out)
    batch(engine, file, tmp_path / "other", "--part", 2, "--slots", 2)
    assert whole == contents(tmp_path / "other")
    assert len(rows(out)) == 40


def test_two_jobs_in_one_folder_are_refused(
    tower: Path, photos: list[Path], tmp_path: Path
) -> None:
    import fcntl

    out = tmp_path / "job"
    out.mkdir()
    held = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match="another process is at work"):
            batch(tower, photos[0].parent, out)
    finally:
        os.close(held)
    batch(tower, photos[0].parent, out)


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (["ENGINE", "PHOTOS", "OUT"], InputError, "no question about them"),
        (["ENGINE", "REQUESTS", "OUT", "--prompt", "What?"], InputError, "its own prompts"),
        (["ENGINE", "REQUESTS", "OUT", "--normalize"], ConfigError, "--normalize"),
        (["TOWER", "REQUESTS", "OUT"], InputError, "answers none"),
        (["TOWER", "PHOTOS", "OUT", "--prompt", "What?"], ConfigError, "--prompt is for questions"),
        (["TOWER", "PHOTOS", "OUT", "--strict"], ConfigError, "--strict is for questions"),
        (["TOWER", "PHOTOS", "OUT", "--format", "csv"], ConfigError, "--format 'csv'"),
        (["TOWER", "PHOTOS", "OUT", "--part", "0"], ConfigError, "--part 0"),
        (["TOWER", "PHOTOS", "OUT", "--actors", "2"], ConfigError, "processes of Ray"),
        (["TOWER", "PHOTOS", "PHOTOS"], OutputError, "no part of a job"),
        (["TOWER", "NONE", "OUT"], InputError, "none of 1 requests"),
    ],
)
def test_what_is_refused(
    words: list[str],
    kind: type[ToolkitError],
    says: str,
    engine: Path,
    tower: Path,
    requests: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "none.txt").write_text("/nowhere/at all.png")
    places = {
        "ENGINE": engine,
        "TOWER": tower,
        "PHOTOS": requests.parent,
        "REQUESTS": requests,
        "NONE": tmp_path / "none.txt",
        "OUT": tmp_path / "job",
    }
    with pytest.raises(kind, match=says):
        batch(*(places.get(word, word) for word in words))


@pytest.mark.parametrize(
    ("actors", "threads", "machines", "share"),
    [
        (None, 0, [2], (1, 2)),
        (2, 0, [2], (2, 1)),
        (3, 0, [2], None),
        (2, 2, [2], None),
        (None, 0, [8, 4], (2, 4)),
        (3, 4, [8, 4], (3, 4)),
        (4, 3, [8, 4], None),
        (0, 1, [8], None),
    ],
)
def test_actors_and_threads_fit_the_machines(
    actors: int | None, threads: int, machines: list[int], share: tuple[int, int] | None
) -> None:
    """Ray would wait without end for processors that there are not."""
    resources = [{"CPU": float(count)} for count in machines]
    if share is None:
        with pytest.raises(ConfigError, match="--actors"):
            ray_data._share(Cluster("local", actors), threads, resources, on_card=False)
        return
    found = ray_data._share(Cluster("local", actors), threads, resources, on_card=False)
    assert (found.actors, found.threads) == share


def test_what_is_written_is_whole_or_not_there(tmp_path: Path) -> None:
    def fails(stream: Any) -> None:
        stream.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        batch_parts._write(tmp_path / "part", fails)
    assert list(tmp_path.iterdir()) == []


def test_without_ray_the_extra_is_named(
    tower: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    with pytest.raises(MissingExtra, match="a batch on Ray needs") as refused:
        batch(tower, photos[0].parent, tmp_path / "job", "--ray", "local")
    assert refused.value.hint == "pip install 'edgevlm[ray]'"
