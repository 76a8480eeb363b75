"""The pages say what is there: verbs, options, systems, presets, files; and their snippet runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from edgevlm import cli
from edgevlm.toolkit import systems
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
    place = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    engine = engine_of(ROOT / case / "llava-v1.5-tiny", tmp_path / "demo-out")
    engine.rename(tmp_path / "demo-out/engine")
    (tmp_path / case).mkdir(parents=True)
    shutil.copy(ROOT / case / "image.png", tmp_path / case)
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[place][1], "README.md", "exec"), {})
    assert capsys.readouterr().out == blocks[place + 1][1]
