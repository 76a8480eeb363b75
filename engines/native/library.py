"""Kernels of our own for this processor, compiled by the system's C compiler when first needed.

They are for x86 with AVX-512 VNNI. The library is kept in the user's cache folder, under the hash
of its sources, compiler and options, and made anew where it is not what was made. Nothing of it
lies in an engine: an engine has no machine code, and runs without the library as well.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.target import instruction_sets, machine

SWITCH = "EDGEVLM_NATIVE"
DOMAIN = "edgevlm.native"
NEEDED = "avx512_vnni"
FORMS = ("plain", "8-bit", "8-bit and bfloat16")  # of attention.h's attention_form, in its order
_SOURCES = ("attention.c", "attention_vnni.c", "rows.c", "library.c", "halves.c", "upcast.c")
_HEADERS = ("attention.h", "halves.h", "halves_tiles.h", "onnxruntime.h", "ops.h", "rows.h")
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
_SECONDS = 120  # for the compiler


@dataclass(frozen=True)
class Native:
    """path: of the library, None where there is none; why: there is none. form: of its products."""

    path: Path | None = None
    why: str = ""
    form: str = ""


def native() -> Native:
    """The library for this processor, made now if it was not before.

    Never raises but for a value of EDGEVLM_NATIVE that is neither 0 nor 1: ConfigError.
    """
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1"):
        raise ConfigError(f"{SWITCH}={wanted!s:.40} is neither 0 nor 1", hint=f"unset {SWITCH}")
    if wanted == "0":
        return Native(why=f"{SWITCH}=0")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return _native(root / "edgevlm" / "native", "cc")


def described() -> str:
    """The library for this processor in words, or why there is none."""
    found = native()
    return f"products in {found.form}, {found.path}" if found.path else f"none: {found.why}"


@cache
def _native(folder: Path, compiler: str) -> Native:
    """The same for a cache folder and a compiler, tried once in a process."""
    if sys.platform != "linux" or machine() != "x86_64":
        return Native(why="there are kernels for Linux on x86 alone")
    if NEEDED not in instruction_sets():
        return Native(why=f"this processor has no {NEEDED}")
    try:
        return _loaded(_made(folder, compiler))
    except _NotMade as failed:
        return Native(why=str(failed))
    except (OSError, subprocess.SubprocessError) as failed:
        return Native(why=f"{type(failed).__name__}: {failed!s:.200}")


class _NotMade(Exception):
    """Why there is no library."""


def _loaded(path: Path) -> Native:
    library = ctypes.CDLL(str(path))
    form = FORMS[library.edgevlm_attention_form()]
    if form == FORMS[0]:  # as on systems that do not save the registers of AVX-512
        return Native(why="the system does not offer AVX-512 VNNI")
    return Native(path, form=form)


def _made(folder: Path, compiler: str) -> Path:
    """The library in `folder`, which only its owner may write."""
    program = shutil.which(compiler)
    if program is None:
        raise _NotMade(f"there is no C compiler ({compiler})")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(folder)
    path = folder / f"{_name(Path(program).resolve())}.so"
    seal = path.with_suffix(".sha256")
    if not _is_whole(path, seal):
        _compile(program, path, seal)
    return path


def _name(program: Path) -> str:
    """The hash of all that decides what the library is."""
    here, found = Path(__file__).parent, hashlib.sha256()
    for name in (*_HEADERS, *_SOURCES):
        found.update((here / name).read_bytes())
    known = program.stat()
    found.update(repr((str(program), known.st_size, known.st_mtime_ns, _FLAGS)).encode())
    return found.hexdigest()[:32]


def _require_own(path: Path) -> None:
    """Raise _NotMade for what others own or may write: who writes it runs code here."""
    found = path.lstat()
    kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    if not kind or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _NotMade(f"{path} belongs to others, or they may write it")


def _is_whole(path: Path, seal: Path) -> bool:
    """Whether the library is there as it was made; loading a part of one would end the process."""
    if not (path.exists() and seal.exists()):
        return False
    _require_own(path)
    _require_own(seal)
    return hashlib.sha256(path.read_bytes()).hexdigest() == seal.read_text("ascii", "replace")


def _compile(program: str, path: Path, seal: Path) -> None:
    """Make the library beside its place, and put it there in one step; the seal comes last."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        part, sealed = Path(work) / "library.so", Path(work) / "library.sha256"
        sources = [str(here / name) for name in _SOURCES]
        command = [program, *_FLAGS, "-o", str(part), *sources, "-lm"]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode or not part.exists():
            said = (done.stderr.strip() or "nothing was made").splitlines()[0]
            raise _NotMade(f"{program} cannot compile it: {said:.200}")
        part.chmod(0o600)
        sealed.write_text(hashlib.sha256(part.read_bytes()).hexdigest(), encoding="ascii")
        part.replace(path)
        sealed.replace(seal)
