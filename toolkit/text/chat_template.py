"""The chat template of a checkpoint: Jinja text that makes a prompt from messages.

It is rendered as transformers renders it (apply_chat_template), in Jinja's sandbox: a template
comes with the weights and is no more trusted than they are.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.text import templates

if TYPE_CHECKING:
    import jinja2

Messages = list[dict[str, Any]]
_FORM = 99  # letters of a date's form
_TURN = "turn {} of the conversation"
_PRINTED = re.compile("""['"]text['"]: *['"]turn 0""")  # a list of contents, as Python or as JSON


def render(
    source: str,
    special_tokens: Mapping[str, str],
    turns: Sequence[str],
    images: Sequence[int],
    slot: str,
) -> str:
    """The prompt up to the beginning of the next answer, or up to the end of the last one.

    turns: user and assistant, the user first; if the assistant's is the last, nothing follows it.
    images: how many belong in front of each turn. slot: the text of an image, for templates
    that know text alone. special_tokens: bos_token and the like. Raises InputError if the template
    cannot be rendered.
    """
    template = _compiled(source)
    bounds: Any = template.environment
    bounds.renew()
    form = _form(template, special_tokens, images, slot)
    return _rendered(template, special_tokens, form(turns, images, slot))


def _with_parts(turns: Sequence[str], images: Sequence[int], slot: str) -> Messages:
    """Every turn as a list of images and texts, as processors of vision models take it."""
    messages = []
    for number, text in enumerate(turns):
        shown = [{"type": "image"}] * images[number]
        messages.append(_message(number, [*shown, {"type": "text", "text": text}]))
    return messages


def _with_plain_answers(turns: Sequence[str], images: Sequence[int], slot: str) -> Messages:
    """Questions as lists, answers as texts."""
    messages = _with_parts(turns, images, slot)
    for message, text in zip(messages[1::2], turns[1::2], strict=True):
        message["content"] = text
    return messages


def _with_texts(turns: Sequence[str], images: Sequence[int], slot: str) -> Messages:
    """Every turn as a text, images as slots before it."""
    return [
        _message(number, f"{slot}\n" * images[number] + text) for number, text in enumerate(turns)
    ]


def _message(number: int, content: Any) -> dict[str, Any]:
    return {"role": "assistant" if number % 2 else "user", "content": content}


_FORMS = (_with_parts, _with_plain_answers, _with_texts)


def _form(
    template: jinja2.Template, special_tokens: Mapping[str, str], images: Sequence[int], slot: str
) -> Any:
    """The first form of messages from which the template makes every turn and image slot.

    A template that joins contents as texts fails on lists, prints them as Python shows them, or
    leaves them out. Raises InputError where no form works.
    """
    turns = [_TURN.format(number) for number in range(len(images))]
    failure: InputError | None = None
    for form in _FORMS:
        try:
            shown = _rendered(template, special_tokens, form(turns, images, slot))
        except InputError as odd:
            failure = odd
            continue
        whole = all(turn in shown for turn in turns) and shown.count(slot) == sum(images)
        if whole and not _PRINTED.search(shown):
            return form
    raise failure or _refused(f"it leaves out a turn, or does not write {slot!r} for each image")


def _rendered(
    template: jinja2.Template, special_tokens: Mapping[str, str], messages: Messages
) -> str:
    try:
        return template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=messages[-1]["role"] == "user",
            **special_tokens,
        )
    except Exception as odd:  # a template may raise anything that Python raises
        raise _refused(_said(odd)) from None


def _said(odd: Exception) -> str:
    return f"{type(odd).__name__}: {odd}"


def _refused(reason: str) -> InputError:
    names = ", ".join(sorted(templates.TEMPLATES))
    return InputError(
        f"the chat template of the checkpoint cannot be rendered: {reason}",
        hint=f"choose a conversation template with --template NAME: {names}",
    )


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """The template in transformers' environment. Raises InputError for text that is none."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    from edgevlm.toolkit.text.template_bounds import Bounded

    class Generation(Extension):
        """`{% generation %}` marks answers for training; here its body is rendered."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _now
    try:
        with warnings.catch_warnings():  # published templates hold escapes that Python deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            template: jinja2.Template = environment.compiled(source)
    except Exception as odd:
        raise _refused(_said(odd)) from None
    return template


def _now(form: str) -> str:
    """The time, in a form that states no widths."""
    if len(form) > _FORM or re.search(r"%[^a-zA-Z%]*\d", form):
        raise ValueError(f"{form!r:.40} is no form of a date")
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter writes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
