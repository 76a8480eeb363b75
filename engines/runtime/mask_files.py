"""The masks of an answer as files and as JSON, for the verb `run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.engines.runtime.reply import Answer
from edgevlm.engines.runtime.request_file import Request
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import InputError, OutputError
from edgevlm.toolkit.images import decode, rle
from edgevlm.toolkit.strict import to_plain

if TYPE_CHECKING:
    from PIL.Image import Image

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Colours that differ, also for most who see few; masks beyond these use them again.
_COLOURS = ((230, 25, 75), (0, 130, 200), (255, 225, 25), (60, 180, 75), (145, 30, 180))


@dataclass(frozen=True)
class Wanted:
    """What `run` was asked for. masks, overlay: files to write; forced: --force-seg."""

    masks: Path | None = None
    overlay: Path | None = None
    forced: bool = False

    def check(self, *, many: bool) -> None:
        """Raise InputError or OutputError where files cannot be written as they are named."""
        ends = {"--masks": (self.masks, _PICTURES[:1]), "--overlay": (self.overlay, _PICTURES)}
        for option, (path, known) in ends.items():
            if path is None:
                continue
            if many:
                raise InputError(
                    f"{option} is for one question",
                    hint="with --input, take the masks from --output or --json",
                )
            if path.suffix.lower() not in known:
                raise InputError(f"{option} {path} does not end with {' or '.join(known)}")
            if path.exists():
                raise OutputError(f"{path} exists", hint="choose another name, or remove it")
            if not path.parent.is_dir():
                raise OutputError(f"{path.parent} is not a folder", hint="make it first")

    def check_engine(self, session: Session) -> None:
        """Raise InputError if masks are wanted of a model that makes none."""
        given = {"--masks": self.masks, "--overlay": self.overlay, "--force-seg": self.forced}
        options = [option for option, value in given.items() if value]
        if options and session.segmentation is None:
            raise InputError(
                f"{', '.join(options)}: {session.model.name} makes no masks",
                hint="build an engine of MLCD-Seg, or leave it out",
            )

    def asked(self, request: Request, session: Session) -> Request:
        """The request with the answer that --force-seg gives it."""
        segmenter = session.model.segmenter
        if not self.forced or segmenter is None or request.question is None:
            return request
        return replace(request, question=replace(request.question, answer=segmenter.token))

    def write(self, answer: Answer, question: Question) -> list[str]:
        """Write the files; lines on what was written, for people."""
        if self.masks is None and self.overlay is None:
            return []
        if not answer.segments:
            return ["no mask: the answer holds no [SEG]"]
        written = []
        if self.masks is not None:
            for number, mask in enumerate(answer.masks):
                written.append(_saved(_image_of(mask), self.masks, number))
        if self.overlay is not None:
            images = question.checked().images
            for place, number in enumerate(dict.fromkeys(m.image for m in answer.segments)):
                own = [m.pixels for m in answer.segments if m.image == number]
                picture = _overlaid(decode.load(images[number]).rgb, own)
                written.append(_saved(picture, self.overlay, place))
        return [f"wrote {name}" for name in written]


def data(answer: Answer) -> dict[str, Any]:
    """An answer as JSON: its fields, and masks as run lengths where the model makes any."""
    fields: Mapping[str, Any] = {k: v for k, v in vars(answer).items() if k != "segments"}
    plain: dict[str, Any] = to_plain(fields)
    if answer.segments is not None:
        plain["masks"] = [{"image": m.image, **rle.encode(m.pixels)} for m in answer.segments]
    return plain


def numbered(path: Path, number: int) -> Path:
    """OUT.png, OUT-1.png, OUT-2.png, ..."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def _saved(picture: Image, path: Path, number: int) -> str:
    path = numbered(path, number)
    try:
        picture.save(path)
    except OSError as refused:
        raise OutputError(f"{path} cannot be written: {refused.strerror or refused}") from None
    return str(path)


def _image_of(mask: Any) -> Image:
    """One bit a pixel: 1, which is shown white, where the object is."""
    from PIL import Image

    return Image.fromarray(mask)


def _overlaid(picture: Image, masks: Sequence[Any]) -> Image:
    """The picture with every mask tinted."""
    from PIL import Image

    pixels = np.asarray(picture).astype(np.float32)
    for number, mask in enumerate(masks):
        if mask.shape != pixels.shape[:2]:  # the quirk one-mask-size: no picture of its own
            continue
        colour = np.asarray(_COLOURS[number % len(_COLOURS)], np.float32)
        pixels[mask] = (pixels[mask] + colour) / 2
    return Image.fromarray(pixels.astype(np.uint8))
