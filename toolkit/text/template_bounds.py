"""Bounds for the chat template of a stranger: Jinja's sandbox keeps it from objects, not from time.

A rendering has a budget of letters. Every round of a loop and every call costs as much as the
template is long, since that much may be written in it; what makes texts longer costs what it may
make. A template of a conversation of hundreds of turns needs a small part of it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

BUDGET = 50_000_000
_ROUND = 1000  # letters that a round or a call costs at least
_MOST_BITS = 10_000
_WIDTHS = re.compile(r"\d{4,}|\*")  # in a format: how wide a value is to be
_CONCATENATED, _COUNTED = "_concatenated", "_counted"


class Bounded(ImmutableSandboxedEnvironment):
    """An environment whose templates, compiled by `compiled`, render within the budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._left = threading.local()
        self.globals.pop("lipsum", None)
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.filters[_CONCATENATED] = self._concatenated
        self.filters[_COUNTED] = self._counted
        self.finalize = self._shown

    def compiled(self, source: str) -> Any:
        """The template of a source. Raises what Jinja raises."""
        self.renew()
        tree, cost = self.parse(source), _ROUND + len(source)
        for loop in tree.find_all(nodes.For):
            rounds = [nodes.Const(cost)]
            loop.iter = nodes.Filter(loop.iter, _COUNTED, rounds, [], None, None)
        _replace_concat(tree)
        tree.set_environment(self)
        template = self.from_string(tree)
        template.globals["_cost"] = cost
        return template

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter that is paid."""
        self.filters[name] = self._paid(function)

    def renew(self) -> None:
        """A rendering of this thread begins, with the whole budget."""
        self._left.letters = BUDGET

    def spend(self, letters: int) -> None:
        """Raise SecurityError where the budget does not have so many letters left."""
        self._left.letters = getattr(self._left, "letters", BUDGET) - letters
        if self._left.letters < 0:
            raise SecurityError("it repeats or lengthens texts beyond all conversations")

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in a template; a method's own text counts too."""
        self.spend(int(context.parent.get("_cost", _ROUND)))
        name, own = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        self._pay(name, [own] if isinstance(own, (str, list, tuple, dict)) else [], args, kwargs)
        return super().call(context, called, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`text.format(...)`, for texts that state no widths in thousands."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDTHS.search(value.__self__):
            raise SecurityError("a format is too wide")
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make something larger."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            if bits > _MOST_BITS:
                raise SecurityError("a number is too large")
        elif operator == "*":
            times = [side for side in (left, right) if isinstance(side, int)]
            self.spend((self._size(left) + self._size(right)) * max(1, *times, 1))
        else:
            if operator == "%" and isinstance(left, str) and _WIDTHS.search(left):
                raise SecurityError("a format is too wide")
            self.spend(self._size(left) + self._size(right))
        return super().call_binop(context, operator, left, right)

    def _paid(self, function: Any) -> Any:
        name = function.__name__
        passes = hasattr(function, "jinja_pass_arg")  # its first argument is Jinja's own

        def paid(*args: Any, **kwargs: Any) -> Any:
            self._pay(name, [], args[1:] if passes else args, kwargs)
            return function(*args, **kwargs)

        paid.__dict__.update(getattr(function, "__dict__", {}))  # what Jinja is to hand over
        return paid

    def _pay(self, name: str, own: list[Any], args: Any, kwargs: Any) -> None:
        """What a call may make: all that it gets, as many times as its largest number says."""
        given = [*own, *args, *kwargs.values()]
        if "format" in name and any(isinstance(v, str) and _WIDTHS.search(v) for v in given):
            raise SecurityError("a format is too wide")
        times = max([1, *(abs(v) for v in given if type(v) is int)])
        texts = [value for value in given if isinstance(value, str)]
        if "replace" in name and len(texts) >= 3:
            times = max(times, 1 if texts[1] and texts[1] not in texts[0] else len(texts[2]))
        self.spend(sum(map(self._size, given)) * times + times)

    def _size(self, value: Any) -> int:
        """Letters of a value, and of all within it."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, dict):
            return sum(self._size(key) + self._size(item) for key, item in value.items()) + 2
        if isinstance(value, (list, tuple)):
            total = 2
            for item in value:
                total += 2 + self._size(item)
                if total > BUDGET:
                    break
            return total
        return 8

    def _concatenated(self, values: list[Any]) -> str:
        texts = [str(value) for value in values]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def _counted(self, items: Any, cost: int) -> _Counted:
        return _Counted(items, lambda: self.spend(cost))

    def _shown(self, value: Any) -> Any:
        self.spend(self._size(value))
        return value


class _Counted:
    """What a loop goes through; every round is paid."""

    def __init__(self, items: Any, pay: Callable[[], None]) -> None:
        self._items, self._pay = items, pay

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._pay()
            yield item

    def __len__(self) -> int:
        return len(self._items)


def _replace_concat(node: nodes.Node) -> None:
    """a ~ b as a filter's work, for there is no other way to see it."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_concat(value)
            if isinstance(value, nodes.Concat):
                setattr(node, name, _as_filter(value))
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_concat(item)
                    if isinstance(item, nodes.Concat):
                        value[number] = _as_filter(item)


def _as_filter(node: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(nodes.List(list(node.nodes)), _CONCATENATED, [], [], None, None)
