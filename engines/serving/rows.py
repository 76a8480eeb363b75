"""How many rows a batch of single tokens must have, so that each is computed as in any other batch.

Kernels for products work on two, four or more rows together, and have another kernel for what is
left over, which may add in another order. Measured with ONNX Runtime 1.31 on a processor with
AVX-512 VNNI: an odd row's logits differ by 3e-7 of the largest logit with rounded rows, and by 3 %
with MatMulNBits, where the last bit decides how the next layer's input is rounded; batches of an
even number of rows agree to the last bit, and in float32 all do. On a graphics card TensorRT has
other kernels for a single row than for several.
"""

from __future__ import annotations

import numpy as np

from edgevlm.engines.backends.state import State
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import UnsupportedError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence

_MULTIPLES = (1, 2, 4, 8)
_TOKENS, _TRIALS = 20, 2  # of the prompts that are tried, and how often


def rows_together(session: Session, slots: int, *, strict: bool) -> tuple[int, State]:
    """The smallest number of which batches must have a multiple, and a state for that.

    It is found by trying; the state has `slots` slots, or a few more. With one slot, with `strict`,
    or where slots cannot be moved, rows are decoded one at a time. Raises UnsupportedError where no
    multiple works.
    """
    if strict or slots == 1 or not session.new_state().movable:
        return 1, session.new_state(slots)
    most = -(-max(slots, 2) // _MULTIPLES[-1]) * _MULTIPLES[-1]
    found = _logits(session, min(most, 2 * _MULTIPLES[-1]))
    for multiple in _MULTIPLES:
        if _agree(found, multiple):
            return multiple, session.new_state(-(-slots // multiple) * multiple)
    raise UnsupportedError(
        "this engine's kernels compute a row of a batch differently in every batch",
        hint="serve with --strict, which decodes one row at a time",
    )


def _logits(session: Session, most: int) -> dict[int, list[Array]]:
    """For each number of rows, the logits of a few random steps."""
    generator = np.random.default_rng(0)
    vocab = session.model.lm.config.vocab_size
    length = max(min(_TOKENS, session.engine.context - _TRIALS), 1)
    state, nothing = session.new_state(most), session.encode((), Clock()).rows
    for slot in range(most):
        ids = generator.integers(0, vocab, (1, length))
        piece = PromptSequence(ids, np.full_like(ids, -1))
        session.read_piece(piece, 0, nothing, state.slot(slot), 0)
    steps = generator.integers(0, vocab, (_TRIALS, most)).tolist()
    found: dict[int, list[Array]] = {}
    for number, tokens in enumerate(steps):
        for rows in range(1, most + 1):  # the same positions are written again with the same keys
            positions = [length + number] * rows
            logits = session.decode_batch(tokens[:rows], positions, state.slots(0, rows))
            found.setdefault(rows, []).append(np.array(logits))
    return found


def _agree(found: dict[int, list[Array]], multiple: int) -> bool:
    """Whether batches of every multiple of so many rows have the same logits, row by row."""
    sizes = [rows for rows in found if rows % multiple == 0]
    return all(
        np.array_equal(few[: len(few)], many[: len(few)])
        for smaller, larger in zip(sizes, sizes[1:], strict=False)
        for few, many in zip(found[smaller], found[larger], strict=True)
    )
