"""Templates of strangers end: they have neither all the time nor all the memory."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.text import chat_template

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
BEYOND = "it repeats or lengthens texts beyond all conversations"
GROWING = "{% set n = namespace(x=START) %}{% for i in range(60) %}STEP{% endfor %}{{ n.x }}"
LONG = "{% set s = 'x' * 100000 %}"
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "letters": "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "times": "{{ 'x' * 10**9 }}",
    "list times": "{{ ([0] * 10**9)|length }}",
    "joined": GROWING.replace("START", "'aaaa'").replace("STEP", "{% set n.x = n.x ~ n.x %}"),
    "added": GROWING.replace("START", "'aaaa'").replace("STEP", "{% set n.x = n.x + n.x %}"),
    "printed": LONG + "{{ [s] * 5000 }}",
    "join": LONG + "{{ range(99999)|map('string')|join(s) }}",
    "replace": LONG + "{{ s|replace('x', s) }}",
    "replace by method": LONG + "{{ s.replace('', s) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "ljust": "{{ 'x'.ljust(999999999) }}",
    "indent": "{{ 'a\n'|indent(999999999) }}",
    "tojson": "{{ {'a': 1}|tojson(indent=999999999) }}",
    "batch": "{{ [1]|batch(999999999, 'x')|list }}",
    "slice": "{{ [1]|slice(999999999)|list }}",
    "nested format": "{{ '{:>{}}'.format(1, 999999999) }}",
}
WIDE = ["{{ '%0999999d' % 1 }}", "{{ '%*d' % (99999, 1) }}", "{{ '{:>99999}'.format(1) }}",
        "{{ '%99999d'|format(1) }}"]  # fmt: skip
OTHERS = {
    "{{ 9**99999 }}": "a number is too large",
    "{{ lipsum(n=1) }}": "'lipsum' is undefined",
    "{{ strftime_now('%999999d') }}": "is no form of a date",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{% include '/etc/passwd' %}": "no loader",
}


def rendered(source: str, turns: tuple[str, ...] = ("Hello",)) -> str:
    return chat_template.render(source, {}, turns, [0] * len(turns), "<image>")


@pytest.mark.parametrize("case", ENDLESS)
def test_what_never_ends_is_refused(case: str) -> None:
    with pytest.raises(InputError, match=BEYOND):
        rendered(PLAIN + ENDLESS[case])


@pytest.mark.parametrize("source", WIDE)
def test_a_wide_format_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="a format is too wide"):
        rendered(PLAIN + source)


@pytest.mark.parametrize("source", OTHERS)
def test_other_ways_out_are_refused(source: str) -> None:
    with pytest.raises(InputError, match=OTHERS[source]):
        rendered(PLAIN + source)


def test_what_templates_do_is_as_in_jinja() -> None:
    """Loops with all that they know of themselves, ~, filters and methods, calls of macros."""
    source = (
        "{% macro say(m, end='\\n') %}{{ m.role ~ ': ' ~ m.content ~ end }}{% endmacro %}"
        "{% for m in messages if m.content %}{{ loop.index ~ '/' ~ loop.length }} {{ say(m) }}"
        "{% if loop.last %}last{% elif loop.nextitem %}next {{ loop.nextitem.role }}{% endif %}\n"
        "{% else %}none{% endfor %}"
        "{% for key, value in {'a': [1, 2]}|items %}{{ key }}={{ value|join('+') }}{% endfor %}"
        "{{ ' x '.strip()|upper|indent(2) }} {{ '%s-%d' % ('a', 3) }} {{ '{:>4}'.format(7) }}"
        "{% for c in 'ab' recursive %}{{ c }}{% endfor %}{% for x in nothing %}{% endfor %}"
    )
    turns = ("one", "two", "three")
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)
    ]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    expected = plain.from_string(source).render(messages=messages)
    assert expected.startswith("1/3 user: one")
    assert rendered(source, turns) == expected


def test_a_long_conversation_is_within_the_budget() -> None:
    turns = tuple(f"turn {n} " + "word " * 50 for n in range(601))
    source = "{# " + "explained at length " * 400 + "#}" + PLAIN
    assert rendered(source, turns).count("\n") == 601
    with pytest.raises(InputError, match=BEYOND):  # not kept from rendering to rendering
        rendered(PLAIN + ENDLESS["loops"])
    assert rendered(source, turns).count("\n") == 601
