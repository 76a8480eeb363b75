"""What `deploy` writes; tests/engines/serving/test_server.py tries the server itself."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from edgevlm import cli
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving import ray_app
from edgevlm.toolkit.errors import BundleError, ConfigError, OutputError, ToolkitError
from tests.engines.serving.served import data_url


def deploy(*words: str) -> None:
    cli.app(["deploy", *words], standalone_mode=False)


def test_the_configuration_says_what_was_asked_for(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a folder" / "out"
    deploy("ray", str(engine), str(out), "--slots", "3", "--threads", "2", "--name", 'my "model"')
    assert f"next: serve run '{out}/serve.yaml'" in capsys.readouterr().out
    found = yaml.safe_load((out / "serve.yaml").read_text())
    (application,) = found["applications"]
    arguments = {"engine": str(engine), "name": 'my "model"', "slots": 3, "threads": 2}
    assert application["args"] == arguments
    module, name = application["import_path"].split(":")
    assert getattr(importlib.import_module(module), name) is ray_app.application
    (deployment,) = application["deployments"]
    assert deployment["name"] == ray_app.DEPLOYMENT
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == 3
    assert deployment["ray_actor_options"] == {"num_cpus": 2}
    with pytest.raises(OutputError, match="cannot be made"):
        deploy("ray", str(engine), str(out))


def test_what_a_replica_runs_answers(engine: Path) -> None:
    import starlette.testclient as web

    app = ray_app._app(engine, "tiny", 2, 1)
    with Session.open(engine, threads=1) as session:
        expected = session.answer(Question("Why?", (), 6)).text
    with web.TestClient(app) as client:
        body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 6}
        found = client.post("/v1/chat/completions", json=body).json()
    assert found["choices"][0]["message"]["content"] == expected


def test_what_a_replica_of_a_tower_runs_embeds(tower: Path, photos: list[Path]) -> None:
    import starlette.testclient as web

    with Embedder.open(tower, threads=1, batch=1) as one:
        (expected,) = one.embed(photos[:1])
    with web.TestClient(ray_app._app(tower, "tiny", None, 1)) as client:
        found = client.post("/v1/embeddings", json={"input": data_url(photos[0])}).json()
    assert expected.vector is not None
    assert np.array_equal(np.asarray(found["data"][0]["embedding"], np.float32), expected.vector)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["slurm", "ENGINE", "OUT"], ConfigError),
        (["ray", "ENGINE", "OUT", "--slots", "0"], ConfigError),
        (["ray", "ENGINE", "OUT", "--replicas", "0"], ConfigError),
        (["ray", "OUT", "OUT"], BundleError),
    ],
)
def test_what_deploy_refuses(
    words: list[str], kind: type[ToolkitError], engine: Path, tmp_path: Path
) -> None:
    places = {"ENGINE": str(engine), "OUT": str(tmp_path / "out")}
    with pytest.raises(kind):
        deploy(*(places.get(word, word) for word in words))
    assert not (tmp_path / "out").exists()
