"""Tier 0: who imports whom, how long things are, what the command line never loads."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("toolkit", "export", "engines", "training", "calibration")
MAY_IMPORT = {name: {name, "toolkit"} for name in PACKAGES} | {"toolkit": {"toolkit"}}
LOOSE = ("__init__.py", "api.py", "cli.py", "requantize.py", "sizing.py")
HEAVY = {"torch", "transformers", "accelerate"}
MOST_ARROWS = 114  # 88 before training and calibration were built, which have 23


def sources(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Names of imported modules, and whether the import only serves the type checker."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in typing_only


def own(name: str) -> str | None:
    """The path below the root of one of our modules, "toolkit.ops.vocabulary"; else None."""
    head, _, rest = name.partition(".")
    return rest if head == "edgevlm" else None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    for path in sources(package):
        for name, _ in imported(path):
            rest = own(name)
            if rest is not None:
                head = rest.split(".")[0]
                assert head in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


def box(path: Path) -> str:
    """The box of a file in the folder diagram: its folder inside toolkit/ or engines/, its
    package elsewhere; cli.py is a box, and so are together the files that connect the packages.
    """
    parts = path.relative_to(ROOT).parts
    if parts in (("requantize.py",), ("sizing.py",)):
        return "api.py"
    if parts[0] in ("toolkit", "engines") and len(parts) > 2:
        return "/".join(parts[:2])
    return (
        parts[0]
        if parts[0] in PACKAGES and parts[0] not in ("toolkit", "engines")
        else str(Path(*parts))
    )


def file_of(module: str) -> Path | None:
    """The file that an import of `module`, or of a name in it, reads."""
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.exists():
                return candidate
    return None


def arrows() -> dict[str, set[str]]:
    """The folder diagram: every box and those that it imports when it is loaded or run."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in [*(ROOT / name for name in LOOSE[1:]), *sources(*PACKAGES)]:
        found[box(path)] |= set()
        for name, _ in imported(path):
            rest = own(name)
            target = file_of(rest) if rest else None
            if target is not None and target != ROOT / "__init__.py" and box(target) != box(path):
                found[box(path)].add(box(target))
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Boxes that import one another in a circle; empty if there is none."""
    left = {name: set(targets) for name, targets in graph.items()}
    while leaves := [name for name, targets in left.items() if not targets]:
        for leaf in leaves:
            del left[leaf]
        for targets in left.values():
            targets.difference_update(leaves)
    return sorted(left)


def test_folders_import_downwards_without_a_circle() -> None:
    graph = arrows()
    assert len(graph) > 15
    assert cycle(graph) == []
    toolkit = {name: t for name, t in graph.items() if name.startswith("toolkit")}
    assert sum(map(len, graph.values())) - engine_arrows(graph) < MOST_ARROWS, graph
    assert all(t.startswith("toolkit") for targets in toolkit.values() for t in targets)


def engine_arrows(graph: dict[str, set[str]]) -> int:
    """Arrows that disappear when engines/ is drawn as one box, as the page draws it."""
    merged: dict[str, set[str]] = defaultdict(set)
    for name, targets in graph.items():
        source = "engines" if name.startswith("engines") else name
        for target in targets:
            end = "engines" if target.startswith("engines") else target
            if end != source:
                merged[source].add(end)
    return sum(map(len, graph.values())) - sum(map(len, merged.values()))


def test_a_circle_would_be_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert cycle({"a": {"b"}, "b": set()}) == []


def test_every_folder_is_explained_in_the_architecture() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    folders = {p.parent for p in sources(*PACKAGES)}
    missing = [
        str(folder.relative_to(ROOT))
        for folder in sorted(folders)
        if f"{folder.name}/" not in page and folder.name not in ("goldens",)
    ]
    assert missing == []


def test_only_training_imports_torch_and_only_export_and_build_import_onnx() -> None:
    for path in sources(*PACKAGES):
        package = path.relative_to(ROOT).parts[0]
        for name, typing_only in imported(path):
            head = name.split(".")[0]
            if head in HEAVY and not typing_only:
                assert package == "training", f"{path.relative_to(ROOT)} imports {name}"
            if head == "onnx" and not typing_only:
                assert package in ("export", "engines"), f"{path.relative_to(ROOT)} imports {name}"


# What cli.py reads to declare flags and verbs; they load nothing but typer themselves.
DECLARING = {
    "edgevlm.calibration",
    "edgevlm.engines.verbs",
    "edgevlm.training",
    "edgevlm.toolkit.terminal",
}


@pytest.mark.parametrize("name", LOOSE)
def test_loose_files_import_little_at_module_level(name: str) -> None:
    found = set()
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    allowed = {"typer", *DECLARING} if name == "cli.py" else set()
    assert {name for name in found if name.split(".")[0] not in sys.stdlib_module_names} <= allowed


def functions() -> Iterator[tuple[str, int]]:
    for path in [*(ROOT / name for name in LOOSE), *sources(*PACKAGES)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                yield f"{path.relative_to(ROOT)}:{node.name}", length


def test_functions_and_files_stay_small(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = dict(functions())
    ordered = sorted(lengths.values())
    median, ninetieth = statistics.median(ordered), ordered[len(ordered) * 9 // 10]
    files = {
        p: len(p.read_text().splitlines())
        for p in [*(ROOT / name for name in LOOSE), *sources(*PACKAGES)]
    }
    with capsys.disabled():
        print(
            f"\n{len(files)} files, {sum(files.values())} lines; {len(ordered)} functions: "
            f"median {median:.0f}, 90th percentile {ninetieth}, longest {ordered[-1]} lines"
        )
    assert median <= 10
    assert ninetieth <= 35
    assert [name for name, length in lengths.items() if length > 60] == []
    assert [str(path) for path, length in files.items() if length > 400] == []


def test_public_functions_have_docstrings() -> None:
    bare = []
    for path in sources(*PACKAGES):
        for node in ast.iter_child_nodes(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name[0] == "_":
                continue
            if not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert bare == []


def test_every_error_is_drawn_in_the_tree() -> None:
    from edgevlm.toolkit import errors

    drawn = errors.__doc__ or ""
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) > 5
    assert [kind.__name__ for kind in kinds if kind.__name__ not in drawn] == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['edgevlm', '--help']\n"
        "try: runpy.run_path('cli.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'torch', 'tokenizers', 'PIL', 'rich'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "LOADED []" in done.stdout
