"""Several replies on one session: turns on its components, and the states that replies hold."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from threading import Lock

from edgevlm.engines.backends.state import State
from edgevlm.toolkit.errors import InputError


class Turns:
    """A lock that threads get in the order in which they came.

    With a plain lock, the thread that decodes would take it again before another one wakes up.
    """

    def __init__(self) -> None:
        self._guard = Lock()
        self._taken = False
        self._waiting: deque[Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            turn = Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C while waiting
            self._leave(turn)
            raise

    def __exit__(self, *exception: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()  # still taken, now by the next thread
            else:
                self._taken = False

    def _leave(self, turn: Lock) -> None:
        with self._guard:
            waits = turn in self._waiting
            if waits:
                self._waiting.remove(turn)
        if not waits:  # the turn was granted just before
            self.__exit__()


class StatePool:
    """States that replies take in turn. A state is made when there are not enough, up to `most`.

    check(made) is called with the number of states before another one is made; it may raise.
    """

    def __init__(
        self, make: Callable[[], State], most: int, check: Callable[[int], None] = lambda made: None
    ) -> None:
        self._make, self._most, self._check = make, most, check
        self._free: deque[State] = deque()
        self._guard = Lock()
        self._made = 0

    def take(self) -> State:
        """A state that no other reply holds. Raises InputError when all are held."""
        state = self._pop() or self._new()
        if state is None:
            gc.collect()  # abandoned replies that an exception or a reference cycle keeps alive
            state = self._pop()
        if state is None:
            raise InputError(
                f"{self._most} replies of this session are open, and it holds no more at once",
                hint="read one to its end or close it, or open the session with more replies",
            )
        return state

    def give(self, state: State) -> None:
        """Return a state. Takes no lock: a garbage collection may call it anywhere."""
        self._free.append(state)

    def drop(self) -> None:
        """Count a state that was taken and does not come back: another one may be made for it."""
        with self._guard:
            self._made -= 1

    def clear(self) -> None:
        """Release the states that nobody holds."""
        self._free.clear()

    def _pop(self) -> State | None:
        try:
            return self._free.pop()
        except IndexError:
            return None

    def _new(self) -> State | None:
        with self._guard:
            if self._made == self._most:
                return None
            self._check(self._made)
            state = self._make()
            self._made += 1
            return state
