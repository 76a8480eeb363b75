"""Tier 0: who imports whom, how long things are, what the runtime never loads."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("toolkit", "export", "engines", "training", "calibration")
MAY_IMPORT = {room: {room, "toolkit"} for room in ROOMS} | {"toolkit": {"toolkit"}}
HEAVY = {"torch", "transformers", "accelerate"}


def sources(*rooms: str) -> Iterator[Path]:
    for room in rooms:
        yield from sorted((ROOT / room).rglob("*.py"))


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
            yield node.module or "", id(node) in typing_only


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for path in sources(room):
        for name, _ in imported(path):
            head = name.split(".")[0]
            if head in (*ROOMS, "cli"):
                assert head in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"


def test_only_training_imports_torch_and_only_export_and_build_import_onnx() -> None:
    for path in sources(*ROOMS):
        room = path.relative_to(ROOT).parts[0]
        for name, typing_only in imported(path):
            head = name.split(".")[0]
            if head in HEAVY and not typing_only:
                assert room == "training", f"{path.relative_to(ROOT)} imports {name}"
            if head == "onnx" and not typing_only:
                assert room in ("export", "engines"), f"{path.relative_to(ROOT)} imports {name}"


def test_the_command_line_imports_only_typer_at_module_level() -> None:
    tree = ast.parse((ROOT / "cli.py").read_text())
    heads = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            heads |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            heads.add((node.module or "").split(".")[0])
    assert heads - set(sys.stdlib_module_names) == {"typer"}


def functions() -> Iterator[tuple[str, int]]:
    for path in [ROOT / "cli.py", *sources(*ROOMS)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                yield f"{path.relative_to(ROOT)}:{node.name}", length


def test_functions_and_files_stay_small(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = dict(functions())
    ordered = sorted(lengths.values())
    median, ninetieth = statistics.median(ordered), ordered[len(ordered) * 9 // 10]
    files = {p: len(p.read_text().splitlines()) for p in [ROOT / "cli.py", *sources(*ROOMS)]}
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
    for path in sources(*ROOMS):
        for node in ast.iter_child_nodes(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name[0] == "_":
                continue
            if not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert bare == []


def test_every_error_is_drawn_in_the_tree() -> None:
    from toolkit import errors

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
