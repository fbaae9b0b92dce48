"""What templates may do comes out as jinja has it; all else is refused before it takes time or memory."""

from __future__ import annotations

import re
import time
from datetime import date
from pathlib import Path

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import sandbox
from data.text import Text, mark
from tests.fuzz import BOMBS

TODAY = date(2024, 7, 26)
VALUES = {
    "messages": [{"role": "user", "content": " Hi a-b "}, {"role": "assistant", "content": "x\ny"}],
    "n": 7,
    "d": {"b": [1, "z"], "a": None},
    "t": (1, 2),
}
USES = [
    "{{ messages|map(attribute='role')|join(', ') }}|{{ messages|join('+', 'content') }}|{{ ['a', 1, none]|join }}|{{ 'abc'|join('-') }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ messages|rejectattr('role', 'in', ['user'])|first }}",
    "{{ messages[0].content|trim|upper|lower|title|capitalize }}{{ '--x-'|trim('-') }}",
    "{{ 'aXa'|replace('a', 'bb') }}{{ 'aa'|replace('a', 'b', 1) }}",
    "{{ [3, 1, 2]|sort|last }}{{ [1, 2]|max }}{{ [1, 2]|min }}{{ [1, 1]|unique|list }}{{ 'abc'|reverse }}{{ [1, 2]|reverse|list }}",
    "{{ nope|default('y') }}{{ ''|d('y', true) }}{{ '7'|int + 1 }}{{ '7.5'|float }}{{ 7.567|round(2) }}{{ -7|abs }}{{ 3|string ~ none }}",
    "{{ d|items|list }}{{ d|dictsort }}{{ 'a\nb'|indent(2) }}{{ 'a\n\nb'|indent('>', true, true) }}{{ ('<' ~ n)|safe }}{{ nope|list }}",
    "{{ messages|select|list|count }}{{ range(5)|reject('odd')|list }}{{ range(3)|map('string')|list }}{{ none|map('upper')|list }}",
    "{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}{{ 3 not in t }}{{ 1 < n <= 7 }}",
    "{{ d.b == [1, 'z'] }}{{ d != {} }}{{ 'b' > 'a' }}{{ messages[0] in messages }}",
    "{{ n + 1 - 2 * 3 / 4 // 1 % 5 ** 2 }}{{ 'a' + 'b' }}{{ [1] + [2] }}",
    "{{ t + (3,) }}{{ 'ab' * 2 }}{{ 2 * [0] }}{{ '%s-%03d' % ('x', 5) }}{{ -n }}",
    "{{ 'abc'[1:] }}{{ 'abc'[::-1] }}{{ messages[:-1]|length }}{{ messages[1:] }}{{ t[0] }}{{ (n, 'x', t) }}{{ [n, [n]] }}{{ {'k': n} }}",
    "{{ 'a b'.split() }}{{ 'a b'.split(' ')[-1] }}{{ ' x '.strip() }}",
    "{{ 'xax'.strip('x') }}{{ 'ab'.startswith(('a', 'c')) }}{{ ', '.join(['a', 'b']) }}",
    "{{ '{} {x}'.format(1, x=2) }}{{ 'a'.rjust(4) }}{{ 'aba'.replace('a', 'c') }}",
    "{{ 'aba'.rfind('a') }}{{ d.get('b', 0) }}{{ d.items()|list }}{{ d.keys()|list }}",
    "{% set ns = namespace(x=0) %}{% for m in messages if m.role != 'x' %}"
    "{% set ns.x = ns.x + loop.index %}{{ loop.cycle('o', 'e') }}{% endfor %}{{ ns.x }}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}"
    "{{ f(1) }}{{ f(1, 2, 3) }}{% macro g() %}{{ caller(3) }}{% endmacro %}{% call(x) g() %}{{ x }}{% endcall %}",
    "{% set j = joiner() %}{{ j() }}{{ j() }}",
    "{{ 'x' is lower }}{{ n is eq 7 }}{{ nope is defined }}{{ messages is iterable }}",
    "{{ n is divisibleby 7 }}{{ 'a' is in 'abc' }}{{ loop is defined }}",
    "{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}"
    "{% filter upper %}a{{ n }}{% endfilter %}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("template", USES)
def test_what_templates_use_comes_out_as_jinja_has_it(template):
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = plain.from_string(template).render(VALUES)
    assert text and sandbox.Environment(TODAY).from_string(template).render(VALUES) == text


@pytest.mark.parametrize("template", BOMBS)
def test_bombs(template, monkeypatch):
    """Each ends, by itself or with an error, soon after its time; and what it wrote is bounded."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    begun = time.thread_time()
    environment = sandbox.Environment(TODAY)
    try:
        compiled = environment.from_string(template)
        environment.start()
        assert len(compiled.render(VALUES)) <= sandbox.MAX_OUTPUT
    except (TemplateError, RecursionError, ValueError, TypeError, OverflowError):
        pass
    assert time.thread_time() - begun < 3.0


REFUSED = {
    "{{ [[1] * 90000] * 90000 }}": "a list has more than 1048576 elements",
    "{{ [0] * 2000000 }}": "a list has more than 1048576 elements",
    "{{ ('a,' * 2000000).split(',') }}": "a list has more than 1048576 elements",
    "{{ ['a' * 1000000] * 20 }}": "more than 16777216 characters",
    "{{ 'ab'.rjust(20000000) }}": "more than 16777216 characters",
    "{{ ('ab' * 5000000).replace('a', 'xxxx') }}": "more than 16777216 characters",
    "{{ ('ab' * 5000000)|replace('a', 'xxxx') }}": "more than 16777216 characters",
    "{{ ('\n' * 5000000)|indent(8) }}": "more than 16777216 characters",
    "{{ (range(99999)|list)|tojson(indent=33) }}": "at most 32 characters",
    "{{ ('a' * 9000000).rfind('b' * 100) }}": "one operation works on more",
    "{{ ('a' * 9000000).rstrip('b' * 100) }}": "one operation works on more",
    "{{ ('a' * 9000000)|trim('b' * 100) }}": "one operation works on more",
    "{{ '%99999d' % 1 }}": "a format with such a width",
    "{{ '{:99999}'.format(1) }}": "a format with such a width",
    "{{ strftime_now('%999Y') }}": "a format with such a width",
    "{{ 1.5|round(101) }}": "more than 100 digits",
    "{{ ('9' * 1001)|int }}": "a number has more than 1000 characters",
    "{{ messages|map(attribute='a.' * 200)|list }}": "the name of an attribute",
    "{{ 'x'|wordwrap(1) }}": "No filter named 'wordwrap'",
    "{{ messages|map('pprint')|list }}": "No filter named 'pprint'",
    "{{ 'x'.encode() }}": "no use for the method encode of str",
    "{{ {}.fromkeys([1]) }}": "no use for the method fromkeys of type",
    "{{ namespace() }}": "a namespace is no value",
    "{{ messages < messages < messages }}": "compared two at a time",
}


@pytest.mark.parametrize("template", REFUSED)
def test_what_is_refused(template):
    with pytest.raises(TemplateError, match=REFUSED[template]):
        sandbox.Environment(TODAY).from_string(template).render(VALUES)


def test_the_sources_of_text_survive():
    """Text stays Text where jinja's own functions would make it plain."""
    environment = sandbox.Environment(TODAY)
    for expression in ("m", "m + 'x'", "'x' ~ m", "m|trim", "m.strip()", "m[1:]", "m|string", "m|upper", "m|replace('b', 'c')", "[m]|join"):
        template = environment.from_string(f"{{{{ {expression} }}}}")
        out = environment.concat(template.root_render_func(template.new_context({"m": mark("ab c ", 5)})))
        assert type(out) is Text and {source for *_, source in out.runs} == {5}, expression


def test_the_docs_name_the_filters():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", text.partition("use these filters:")[2].partition("; another one")[0])
    assert listed == sorted(set(sandbox.Environment(TODAY).filters) - {"generation block"})
