"""Nothing phones home: no store in the user's folders, no socket, whatever a verb imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.refusals import IMAGE
from tests.test_structure import PACKAGES, imported, sources

# The command line, while a thread looks at the sockets among the open files of the process.
SOCKETS = """
import os, sys, threading, time
from pathlib import Path
seen = set()
def look():
    while True:
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
            if target.startswith("socket:"):
                seen.add(target)
        time.sleep(0.0005)
threading.Thread(target=look, daemon=True).start()
sys.path.insert(0, "")
from edgevlm import cli
sys.argv[0] = "edgevlm"
code = cli._guarded(False)
time.sleep(float(os.environ["WAIT"]))  # what was started in other threads
print("SOCKETS", len(seen), "CODE", code, file=sys.stderr)
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """The user's, with a home that is empty and no switch of a library: `CI` is one too."""
    needed = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
    plain = {name: os.environ[name] for name in needed if name in os.environ}
    return plain | {"HOME": str(home), "WAIT": "0.5"} | more


def sockets_of(home: Path, *words: object, **more: str) -> int:
    """How many sockets a verb had, in a process of its own."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list the files of a process")
    done = subprocess.run(
        [sys.executable, "-c", SOCKETS, *map(str, words)],
        cwd=ROOT,
        env=environment(home, **more),
        stdin=subprocess.DEVNULL,  # whatever ours is
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = done.stderr.split()
    assert told[-2:] == ["CODE", "0"], done.stderr
    return int(told[-3])


def test_an_answer_leaves_no_trace_and_opens_no_socket(ready: Path, tmp_path: Path) -> None:
    words = ("run", ready / "engine-cpu", "What?", "--image", IMAGE, "--max-tokens", 2, "--quiet")
    assert sockets_of(tmp_path, *words) == 0
    assert list(tmp_path.rglob("*")) == []


def test_a_build_leaves_no_trace_but_its_own_timings(ready: Path, tmp_path: Path) -> None:
    words = ("build", ready / "bundle", tmp_path / "engine", "--quiet")
    home = tmp_path / "home"
    home.mkdir()
    assert sockets_of(home, *words) == 0
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert [path for path in kept if "edgevlm" not in str(path.relative_to(home))] == []


def test_the_switch_is_set_before_the_package_is_loaded(tmp_path: Path) -> None:
    """ONNX Runtime of 1.31 or newer would begin with a store and a look-up."""
    code = (
        "import os, sys\n"
        "from edgevlm.toolkit.target import load_onnxruntime\n"
        "class Watch:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'onnxruntime':\n"
        "            print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "load_onnxruntime()\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
    )
    for given, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(tmp_path, **given),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [expected, expected]


def test_the_watch_would_see_the_store(tmp_path: Path) -> None:
    """Without the switch the installed release makes its folder: the tests above say something."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 31):
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} has no telemetry on this system")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "import onnxruntime\n"
        "end = time.monotonic() + 60\n"
        "while time.monotonic() < end:\n"
        "    if any('Microsoft' in str(path) for path in Path(sys.argv[1]).rglob('*')):\n"
        "        sys.exit()\n"
        "    time.sleep(0.01)\n"
        "sys.exit('no folder')\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(tmp_path), check=True
    )


def test_one_place_imports_onnxruntime() -> None:
    importing = [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        for name, typing_only in imported(path)
        if name.split(".")[0] == "onnxruntime" and not typing_only
    ]
    assert importing == ["toolkit/target.py"]


def test_a_graph_that_is_none_prints_nothing_of_the_librarys_own(
    ready: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's package prints "EP Error" on stdout, and tries again elsewhere."""
    from edgevlm.engines.backends import sessions

    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(Exception, match="graph.onnx"):
        sessions.open_session(tmp_path / "graph.onnx")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
