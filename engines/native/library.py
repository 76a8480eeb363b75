"""Kernels of our own for this processor, compiled by the system's C compiler when first needed.

They are for x86 from AVX2 on and for 64-bit ARM with 8-bit dot products. The library holds all
forms of its architecture (forms.h) and asks the processor which to use, so that processors may
share a home. It is kept in the user's cache folder, under the hash of its sources, compiler and
options, and made anew where it is not what was made. Nothing of it lies in an engine: an engine has
no machine code, and runs without the library as well.
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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.target import instruction_sets, machine

SWITCH = "EDGEVLM_NATIVE"
DOMAIN = "edgevlm.native"
# of forms.h, in its order
FORMS = ("plain", "avx2", "avx-vnni", "avx512-vnni", "avx512-bf16", "dotprod")
BF16 = "avx512-bf16"
AVX512 = ("avx512-vnni", BF16)  # those of products, and of all that language models have
NEEDED: Mapping[str, str] = {"x86_64": "avx2", "aarch64": "asimddp"}  # by every form but "plain"
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
# Those before binutils 2.36 do not know AVX-VNNI, whose form is left out for them.
_OLD_ASSEMBLER = ("-DEDGEVLM_WITHOUT_AVX_VNNI",)
_SECONDS = 120  # for the compiler


@dataclass(frozen=True)
class Native:
    """path: of the library, None where there is none; why: there is none. form: the one in use."""

    path: Path | None = None
    why: str = ""
    form: str = ""


def native() -> Native:
    """The library for this processor, made now if it was not before.

    EDGEVLM_NATIVE is 0 for none, 1 for the best form that the processor has, or the name of one,
    for comparing them. Never raises but for another value, or a form that is not to be had here:
    ConfigError.
    """
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1", *FORMS):
        raise ConfigError(
            f"{SWITCH}={wanted!s:.40} is neither 0 nor 1, nor one of {', '.join(FORMS)}",
            hint=f"unset {SWITCH}",
        )
    if wanted == "0":
        return Native(why=f"{SWITCH}=0")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    forced = wanted in FORMS
    found = _native(root / "edgevlm" / "native", "cc", forced)
    return _using(found, wanted if forced else None)


def described() -> str:
    """The library for this processor in words, or why there is none."""
    found = native()
    return f"instructions of {found.form}, {found.path}" if found.path else f"none: {found.why}"


@cache
def _native(folder: Path, compiler: str, forced: bool = False) -> Native:
    """The same for a cache folder and a compiler, tried once in a process; forced: also for a
    processor that runs the plain form alone.
    """
    needed = NEEDED.get(machine())
    if sys.platform != "linux" or needed is None:
        return Native(why="there are kernels for Linux on x86 and 64-bit ARM alone")
    if needed not in instruction_sets() and not forced:
        return Native(why=f"this processor has no {needed}")
    try:
        return _loaded(_made(folder, compiler), forced)
    except _NotMade as failed:
        return Native(why=str(failed))
    except (OSError, subprocess.SubprocessError) as failed:
        return Native(why=f"{type(failed).__name__}: {failed!s:.200}")


class _NotMade(Exception):
    """Why there is no library."""


def _loaded(path: Path, forced: bool = False) -> Native:
    library = ctypes.CDLL(str(path))
    library.edgevlm_use_form(-1)
    form = FORMS[library.edgevlm_form_in_use()]
    if form == FORMS[0] and not forced:  # as on systems that do not save the registers
        return Native(why="the system does not offer what the processor has")
    return Native(path, form=form)


def _using(found: Native, form: str | None) -> Native:
    """The library with a form in use from now on, None for the best one."""
    if found.path is None:
        return found
    library = ctypes.CDLL(str(found.path))
    if library.edgevlm_use_form(-1 if form is None else FORMS.index(form)):
        raise ConfigError(
            f"{SWITCH}={form}, and this processor has no such form",
            hint=f"it has {', '.join(forms_here(found))}; unset {SWITCH} for the last of them",
        )
    return replace(found, form=FORMS[library.edgevlm_form_in_use()])


def forms_here(found: Native) -> list[str]:
    """The forms that a library can use on this processor, the best last; [] where there is none."""
    if found.path is None:
        return []
    library = ctypes.CDLL(str(found.path))
    return [name for at, name in enumerate(FORMS) if library.edgevlm_form_is_here(at)]


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
    found, known = hashlib.sha256(), program.stat()
    for file in (*_files("*.h"), *_files("*.c")):
        found.update(file.name.encode() + file.read_bytes())
    made_by = (machine(), str(program), known.st_size, known.st_mtime_ns, _FLAGS)
    found.update(repr(made_by).encode())
    return found.hexdigest()[:32]


def _files(pattern: str) -> list[Path]:
    """The library's own files: every one beside this module belongs to it."""
    return sorted(Path(__file__).parent.glob(pattern))


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
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        part, sealed = Path(work) / "library.so", Path(work) / "library.sha256"
        said = _call(program, part)
        if said is not None and _call(program, part, *_OLD_ASSEMBLER) is not None:
            raise _NotMade(f"{program} cannot compile it: {said:.200}")
        part.chmod(0o600)
        sealed.write_text(hashlib.sha256(part.read_bytes()).hexdigest(), encoding="ascii")
        part.replace(path)
        sealed.replace(seal)


def _call(program: str, part: Path, *flags: str) -> str | None:
    """Have the compiler make the library; the first line of what it says where it does not."""
    done = subprocess.run(
        [program, *_FLAGS, *flags, "-o", str(part), *map(str, _files("*.c")), "-lm"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode == 0 and part.exists():
        return None
    return (done.stderr.strip() or "nothing was made").splitlines()[0]
