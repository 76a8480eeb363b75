"""Which images a command means: files, folders, and lists of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgevlm.toolkit.errors import InputError

# Endings by which images are found in folders; a file that is named is read whatever its ending.
SUFFIXES = frozenset(
    ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .qoi .tga .pcx .sgi .avif".split()
)


def gather(given: Sequence[Path], listed: Path | None) -> list[str]:
    """The files, those in folders in the order of their names, those of a list in its own order.

    listed: a text file with one path a line, as seen from the current folder. Raises InputError if
    there are none, or a file is named twice.
    """
    files = [name for path in given for name in _found(path)]
    if listed is not None:
        files += [name for line in _lines(listed) for name in _found(Path(line))]
    if not files:
        raise InputError("no image was given", hint="name files or folders, or --input list.txt")
    twice = len(files) - len(set(files))
    if twice:
        name = next(file for file, count in Counter(files).items() if count > 1)
        raise InputError(f"{name} was given twice ({twice} files in all)", hint="name it once")
    return files


def _lines(listed: Path) -> list[str]:
    try:
        text = listed.read_text(encoding="utf-8-sig")
    except OSError as refused:
        raise InputError(f"--input {listed} cannot be read: {refused.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--input {listed} is no text in UTF-8") from None
    return [line for line in text.splitlines() if line.strip()]


def _found(path: Path) -> Iterator[str]:
    if not path.is_dir():
        yield str(path)
        return
    names = list(below(path))
    yield from names
    if not names:
        raise InputError(
            f"{path} holds no images", hint="they are found by their endings: .jpg, .png, ..."
        )


def below(folder: Path) -> Iterator[str]:
    """The images in a folder and in those inside it, in the order of their names."""
    with os.scandir(folder) as opened:
        entries = sorted(opened, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=True):
            yield from below(Path(entry.path))
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield entry.path
