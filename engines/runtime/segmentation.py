"""From an answer to masks: what runs behind the language model, if the model has it.

Each token [SEG] of an answer stands for a mask. Its prompt is the language model's state at the
token itself: the token is fed once more, at its own position, which leaves the KV cache as it is
and costs a decode step; so the state is there also where the token is the last one. SAM's encoder
sees an image only where a mask of it was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.engines.backends import Runner
from edgevlm.engines.backends.state import State
from edgevlm.engines.runtime.clock import Clock
from edgevlm.toolkit.images import longest_side
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence
from edgevlm.toolkit.vlm.components import MASK_DECODER, MASK_ENCODER
from edgevlm.toolkit.vlm.config import Segmenter

if TYPE_CHECKING:
    from edgevlm.engines.runtime.session import Session


@dataclass(frozen=True)
class Mask:
    """A mask of an image, which counts from 0. logits: float32 [height, width] of the image."""

    image: int
    logits: Array

    @property
    def pixels(self) -> Array:
        """bool [height, width]: where the object is."""
        return np.asarray(self.logits > 0)


class Segmentation:
    """The encoder and the decoder of masks."""

    def __init__(self, segmenter: Segmenter, token: int, runners: Mapping[str, Runner]) -> None:
        self.token = token
        self._segmenter = segmenter
        self._encoder, self._decoder = runners[MASK_ENCODER], runners[MASK_DECODER]

    def masks(
        self, states: Sequence[Array], images: Sequence[LoadedImage], clock: Clock
    ) -> tuple[Mask, ...]:
        """The masks of states [hidden_size], which images get in turn; image after image.

        Image i of k gets states i, i + k, ... (deepglint/unicom). No image, no masks.
        """
        found: list[Mask] = []
        for number in range(len(images)):
            own = states[number :: len(images)]
            if own:
                found += self._of_image(own, number, images, clock)
        return tuple(found)

    def _of_image(
        self, states: Sequence[Array], number: int, images: Sequence[LoadedImage], clock: Clock
    ) -> list[Mask]:
        rule, rgb = self._segmenter.pixels, images[number].rgb
        with clock.time("segmenter.preprocess"):
            pixels = longest_side.preprocess(rgb, rule)
        with clock.time(MASK_ENCODER):
            features = self._encoder.run({"pixels": pixels[None]})["features.0"]
        size, shown = (rgb.height, rgb.width), self._size(number, images)
        masks = []
        for state in states:
            with clock.time(MASK_DECODER):
                inputs = {"hidden": state[None], "features": features}
                low = self._decoder.run(inputs)["masks"][0]
            with clock.time("segmenter.resize"):
                masks.append(Mask(number, longest_side.mask_logits(low, rule, size, shown)))
        return masks

    def _size(self, number: int, images: Sequence[LoadedImage]) -> tuple[int, int]:
        """Height and width of the masks of an image: its own, or as the quirk has it."""
        sizes = [(image.rgb.height, image.rgb.width) for image in images]
        largest = max(sizes, key=lambda size: size[0] * size[1])
        return largest if self._segmenter.one_size else sizes[number]


class MasksOfReply:
    """What a reply keeps for its masks, which are made when they are first asked for.

    images: of its question, in order. notes: on masks that cannot be made.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._states: list[Array] = []
        self._made: tuple[Mask, ...] | None = None
        self.images: Sequence[LoadedImage] = ()
        self.notes: tuple[str, ...] = ()

    def collect(
        self, sequence: PromptSequence, ids: Sequence[int], given: bool, state: State
    ) -> None:
        """Take the states at the answer's tokens, while `state` is that of the reply.

        ids: of the answer; given: whether they are the end of the prompt sequence.
        """
        assert self._session.segmentation is not None
        token, context = self._session.segmentation.token, self._session.engine.context
        first = sequence.length - len(ids) * given
        places = [first + i for i, number in enumerate(ids) if number == token]
        if places and not self.images:
            self.notes += (f"{len(places)} mask(s) are asked for, and there is no image",)
            return
        if places and places[-1] >= context:
            del places[-1]  # the last token of an answer that fills the context
            self.notes += (f"the last mask is left out: the context of {context} is full",)
        self._states = [self._session.state_at(token, place, state) for place in places]

    def made(self, clock: Clock) -> tuple[Mask, ...]:
        """The masks; their stages are added to the clock."""
        if self._made is None:
            self._made = ()
            if self._states:
                self._made = self._session.masks(self._states, self.images, clock)
        return self._made
