"""The pages describe what exists: verbs, options, systems, presets, files; and their code runs."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

import edgevlm
from edgevlm import cli
from edgevlm.toolkit import errors, systems
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.strict import Reader
from tests.conftest import ROOT
from tests.pipeline import engine_of

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
COMMON = {"--json", "--quiet", "--debug", "--help"}


def options() -> dict[str, set[str]]:
    """Every verb's long options."""
    app = get_command(cli.app)
    return {
        verb: {o for p in command.params for o in p.opts if o.startswith("--")}
        for verb, command in app.commands.items()  # type: ignore[attr-defined]
    }


def sections() -> dict[str, str]:
    """docs/cli.md by heading."""
    parts = re.split(r"^## (.+)$", (ROOT / "docs/cli.md").read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_reference_has_every_verb_and_option_and_no_other() -> None:
    found = sections()
    common = found.pop("What all verbs have in common")
    assert set(re.findall(r"`(--[\w-]+)`", common)) >= COMMON
    told = {verb: set(re.findall(r"^\| `(--[\w-]+)`", text, re.M)) for verb, text in found.items()}
    assert told == {verb: names - COMMON for verb, names in options().items()}


def test_every_system_and_preset_is_named() -> None:
    readme, table = ((ROOT / name).read_text() for name in ("README.md", "docs/systems.md"))
    assert [name for name in systems.names() if f"`{name}`" not in readme] == []
    assert [name for name in systems.presets() if f"`{name}`" not in table] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_snippet_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Path("tests/goldens/e2e_llava15")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    snippet = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    engine = engine_of(ROOT / case / "llava-v1.5-tiny", tmp_path / "demo-exact-out")
    engine.rename(tmp_path / "demo-exact-out/engine")
    (tmp_path / case).mkdir(parents=True)
    shutil.copy(ROOT / case / "image.png", tmp_path / case)
    monkeypatch.chdir(tmp_path)
    code = blocks[snippet][1]
    imports = re.findall(r"^(?:import|from) +(\S+)", code, re.M)
    assert imports == ["edgevlm"]  # the public surface only
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == blocks[snippet + 1][1]


def parameters(call: str) -> list[tuple[str, str]]:
    """Names and defaults of a signature such as "f(a, *, b=1)"."""
    arguments = ast.parse(call, mode="eval")
    assert isinstance(arguments.body, ast.Call)
    given = [ast.unparse(a) for a in arguments.body.args if not isinstance(a, ast.Starred)]
    named = [(str(k.arg), ast.unparse(k.value)) for k in arguments.body.keywords]
    return [(name, "") for name in given] + named


@pytest.mark.parametrize("name", ["export_bundle", "build_engine", "Question", "Sampling"])
def test_the_python_page_has_the_true_signatures(name: str) -> None:
    page = (ROOT / "docs/python.md").read_text()
    told = re.search(rf"^\| `({name}\(.*?\))` \|", page, re.M)
    assert told is not None
    signature = inspect.signature(getattr(edgevlm, name))
    true = [
        (p.name, "" if p.default is p.empty else default_of(p))
        for p in signature.parameters.values()
    ]
    assert parameters(told[1].replace("*, ", "")) == true


def default_of(parameter: inspect.Parameter) -> str:
    """A default as code; that of a dataclass factory is its type called without arguments."""
    made = parameter.name == "sampling"
    return "Sampling()" if made else ast.unparse(ast.parse(repr(parameter.default), mode="eval"))


def test_the_python_page_names_every_public_name_and_error() -> None:
    page = (ROOT / "docs/python.md").read_text()
    types = [k for k in vars(errors).values() if isinstance(k, type)]
    kinds = [kind.__name__ for kind in types if issubclass(kind, Exception)]
    assert [name for name in [*edgevlm.__all__, *kinds] if name not in page] == []


def test_the_glossary_stays_short() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    glossary = re.split(r"^## .*Glossary\n", page, flags=re.M)[1].strip()
    assert 20 < len(glossary.splitlines()) <= 40


def test_the_encoder_of_the_extending_page_works(generator: np.random.Generator) -> None:
    page = (ROOT / "docs/extending.md").read_text()
    code = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert code is not None
    file = types.ModuleType("small")
    sys.modules["small"] = file  # where a dataclass looks up its annotations
    try:
        exec(compile(code[1], "docs/extending.md", "exec"), vars(file))
    finally:
        del sys.modules["small"]
    described = {"num_channels": 3, "projection_dim": 9, "hidden_size": 32, "num_hidden_layers": 3}
    described |= {"num_attention_heads": 4, "intermediate_size": 72, "patch_size": 7}
    config = file.Config.read(Reader(described | {"image_size": 28}, "here"), (3, 1), False)
    assert config == file.tiny()
    assert set(file.names(config)) == set(file.shapes(config))
    weights = {
        name: generator.standard_normal(shape).astype(np.float32) / 8
        for name, shape in file.shapes(config).items()
    }
    pixels = generator.standard_normal((2, 3, *config.pixels)).astype(np.float32)
    outputs = file.forward(NumpyOps(), config, Weights(weights), pixels)
    expected = [(2, config.tokens, size) for size in config.hidden_sizes]
    assert [x.shape for x in outputs] == expected
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1
