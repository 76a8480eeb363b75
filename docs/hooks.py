"""What MkDocs runs: the pages of the root become pages of the site, and their links lead there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand at the root of the project."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as a page of docs/ has them: root pages by their new names, other files of the project
    as plain text, since the site does not hold them.
    """
    folder = ROOT if page.file.src_uri in PAGES.values() else ROOT / "docs"
    return _LINK.sub(lambda link: _moved(link, folder), markdown)


def _moved(link: re.Match[str], folder: Path) -> str:
    bang, text, target, anchor = link.groups()
    if not target or "://" in target or target.startswith("mailto:"):
        return link[0]
    path = (folder / target).resolve()
    if path.parent == ROOT and path.name in PAGES:
        return f"{bang}[{text}]({PAGES[path.name]}{anchor or ''})"
    if (ROOT / "docs") in path.parents:
        return f"{bang}[{text}]({path.relative_to(ROOT / 'docs')}{anchor or ''})"
    return text if path.exists() else link[0]
