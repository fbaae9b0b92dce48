"""The jinja environment that chat templates run in: a stranger's program, so all that it does has a bound.

jinja's immutable sandbox keeps a template away from Python and from changing what it is given. It bounds neither memory nor
time, and one call of a filter or a method, which nothing can interrupt, may work for hours. So here

* only filters, and methods of values, that chat templates have a use for exist;
* no string is longer than `MAX_OUTPUT` and no list than `MAX_ELEMENTS`. The size of what an operator, a filter or a method
  makes is looked at before it is made, where it could be much larger than what it is made of;
* what goes through nested values (text of them, JSON, comparison, sorting) counts first what is in them, since lists that
  share their parts can hold more than any memory (`weigh`);
* each of them pays for the size of what it works on (`charge`), and so do turns of loops and calls. That is when the clock is
  looked at: between two looks lies at most one operation, which is bounded as said.
"""

from __future__ import annotations

import inspect
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime
from datetime import time as midnight
from time import thread_time
from types import BuiltinMethodType, MethodType

from jinja2 import TemplateError, nodes, pass_context
from jinja2.compiler import CodeGenerator, operators
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.tests import TESTS
from jinja2.utils import Namespace, _PassArg

from data.text import MAX_OUTPUT, Text, join, mark, sources_of

MAX_SECONDS = 1.0  # of this thread's processor, for one conversation; a long one takes some milliseconds
MAX_ELEMENTS = 1 << 20  # of a list, and of all lists and objects within it where they are gone through
MAX_BITS = 1 << 14  # of an integer
MAX_WORK = 1 << 27  # of one operation, in characters; some tenths of a second
GENERATION = -1  # the source of text inside {% generation %}

_LOOK = 1 << 17  # characters of work between two looks at the clock
_TURN = 1 << 10  # what a turn of a loop and a call count as
_ELEMENT = 1 << 6  # what an element of a list counts as
_GENERATED = "generation block"  # the filter behind such a block; no template can write a name with a space
_DICT = frozenset(dir(dict))
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_LISTS = (list, tuple, *_VIEWS)
_NESTED = (dict, Namespace, *_LISTS)
_SEARCHING_BACK = frozenset(("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"))  # work len(text) * len(argument)
_STR = """capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii isdecimal isdigit
 isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace
 rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    range: frozenset(("count", "index")),
    int: frozenset(("bit_length",)),
    float: frozenset(("is_integer",)),
}
# A width that a number or an argument gives, in the two languages of formats.
_WIDTH = {"%": re.compile(r"%[^a-zA-Z%]*(\*|\d{5})"), "{": re.compile(r"\{[^{}]+\{|\{[^{}]*:[^{}]*\d{5}")}
_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model produces."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if _leaves(body):  # what the block has written until then would be lost
            parser.fail("break and continue cannot leave a generation block", line)
        # A filter around the body: several times cheaper than a call block, which makes and calls a macro each time.
        return nodes.FilterBlock(body, nodes.Filter(None, _GENERATED, [], [], None, None)).set_lineno(line)


def _leaves(body: Iterable[nodes.Node]) -> bool:
    """Whether a break or continue in `body` belongs to a loop around it."""
    return any(
        isinstance(node, (nodes.Break, nodes.Continue)) or _leaves(node.else_ if isinstance(node, nodes.For) else node.iter_child_nodes())
        for node in body
    )


def _generated(text: str) -> Text:
    return Text(text, (*getattr(text, "runs", ()), (0, len(text), GENERATION)))


class _Code(CodeGenerator):
    """What jinja would have Python do on the spot goes through the environment."""

    def visit_Concat(self, node, frame):
        """`a ~ b`."""
        self.write("concat((")
        for item in node.nodes:
            self._through("str(environment.shown(", item, frame, ")), ")
        self.write("))")

    def visit_Add(self, node, frame):
        self._through("environment.add(", node.left, frame, ", ")
        self._through("", node.right, frame, ")")

    def visit_Compare(self, node, frame):
        operands = [node.expr, *(op.expr for op in node.ops)]
        if len(node.ops) == 1 and node.ops[0].op in ("eq", "ne") and any(isinstance(one, nodes.Const) for one in operands):
            super().visit_Compare(node, frame)  # with text or a number that the template spells out, which is most of them
        elif len(node.ops) == 1:
            self._through(f"environment.compare({node.ops[0].op!r}, ", operands[0], frame, ", ")
            self._through("", operands[1], frame, ")")
        else:
            self.write("(")
            self._through("environment.flat(", operands[0], frame, ")")
            for op in node.ops:
                self._through(f" {operators[op.op]} environment.flat(", op.expr, frame, ")")
            self.write(")")

    def visit_Getitem(self, node, frame):
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self._through("environment.cut(", node.node, frame, "")
        for part in (node.arg.start, node.arg.stop, node.arg.step):
            self.write(", ")
            self.write("None") if part is None else self.visit(part, frame)
        self.write(")")

    def visit_Tuple(self, node, frame):
        """Tuples can be keys, and the hash of one goes through all that is in it."""
        assigned = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        self.write("" if assigned else "environment.tuple(")
        super().visit_Tuple(node, frame)
        self.write("" if assigned else ")")

    def blockvisit(self, nodes, frame):
        """Bodies of loops begin by looking at the clock."""
        if frame.loop_frame:
            self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def _through(self, before: str, node, frame, after: str) -> None:
        self.write(before)
        self.visit(node, frame)
        self.write(after)


class Raised(TemplateError):
    """The template called raise_exception."""


class Environment(ImmutableSandboxedEnvironment):
    """See the module. `today`: what `strftime_now` tells."""

    code_generator_class = _Code
    intercepted_binops = frozenset(("-", "*", "/", "//", "%", "**"))  # and + by `add`

    def __init__(self, today: date):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self._today = datetime.combine(today, midnight())
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": self._raise, "strftime_now": self._strftime}
        self.filters = {name: _filter(name, function) for name, function in _FILTERS.items()} | {_GENERATED: _generated}
        self.tests = self.tests | _TESTS
        self.finalize = self.shown
        self.concat = self._concat
        self.start()

    # -- time

    def start(self) -> None:
        """A conversation begins."""
        self._work, self._until = 0, thread_time() + MAX_SECONDS

    def charge(self, work: int) -> None:
        """`work`, in characters, is going to be done."""
        if work > MAX_WORK:
            raise SecurityError(f"one operation works on more than {MAX_WORK} characters")
        self._work += work
        if self._work >= _LOOK:
            self._work = 0
            if thread_time() > self._until:
                raise SecurityError(f"it works for more than {MAX_SECONDS:g} s")

    def tick(self) -> None:
        """Called once for each turn of a loop and each call."""
        self.charge(_TURN)

    def each(self, items: Iterable) -> Iterator:
        """The items, which are counted and paid for one by one, with the characters in them."""
        characters = 0
        for number, item in enumerate(items):
            if number >= MAX_ELEMENTS:
                raise SecurityError(f"a list has more than {MAX_ELEMENTS} elements")
            self.charge(_ELEMENT)
            if isinstance(item, str):
                characters += len(item)
                self.characters(characters)
            yield item

    # -- sizes

    def characters(self, count: int) -> None:
        if count > MAX_OUTPUT:
            raise SecurityError(f"more than {MAX_OUTPUT} characters were written")

    def elements(self, count: int) -> None:
        if count > MAX_ELEMENTS:
            raise SecurityError(f"a list has more than {MAX_ELEMENTS} elements")

    def weigh(self, value: object) -> int:
        """Characters of all the text within `value`, which is paid for."""
        elements = characters = 0
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, int):
                characters += item.bit_length() // 3
            elif isinstance(item, dict):
                elements += len(item)
                self.elements(elements)
                stack += item
                stack += item.values()
            elif isinstance(item, _LISTS):
                elements += len(item)
                self.elements(elements)
                stack += item
            elif isinstance(item, Namespace):  # may hold itself
                raise SecurityError("a namespace is no value")
            self.characters(characters)
        self.charge(characters + elements * _ELEMENT)
        return characters

    def shown(self, value: object) -> object:
        """`value`, the text of which is going to be made."""
        if not isinstance(value, str):
            self.weigh(value)
        return value

    def flat(self, value: object) -> object:
        if isinstance(value, _NESTED):
            raise SecurityError("lists and objects are compared two at a time")
        self.charge(_heft(value))
        return value

    def tuple(self, value: tuple) -> tuple:
        """`value`, which holds few tuples."""
        count, stack = 0, [value]
        while stack:
            inner = [item for item in stack.pop() if isinstance(item, tuple)]
            count, stack = count + len(inner), stack + inner
            if count > 100:
                raise SecurityError("a tuple holds more than 100 tuples")
        return value

    def checked(self, value: object) -> object:
        """`value`, which has been made, and is paid for."""
        if isinstance(value, str):
            self.characters(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.elements(len(value))
            if isinstance(value, tuple):
                self.tuple(value)
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SecurityError(f"an integer has more than {MAX_BITS} bits")
        self.charge(_heft(value))
        return value

    # -- what templates do

    def _concat(self, pieces: Iterable[str]) -> str:
        text = join(pieces)
        self.charge(_heft(text))
        return text

    def add(self, a: object, b: object) -> object:
        """`a + b`, which is at most twice as long as things may be."""
        value = a + b
        if type(value) is not Text or len(value) > MAX_OUTPUT:
            return self.checked(value)
        self._work += len(value) + _ELEMENT * len(value.runs)
        if self._work >= _LOOK:
            self.charge(0)
        return value

    def compare(self, name: str, a: object, b: object) -> bool:
        if type(b) is dict and isinstance(a, str):  # a key
            pass
        elif name in ("in", "notin"):
            self._search(a, b)
        elif isinstance(a, _NESTED) and isinstance(b, _NESTED):
            self.weigh(a)
            self.weigh(b)
        else:
            self.charge(_heft(b))
        return _COMPARISONS[name](a, b)

    def _search(self, wanted: object, where: object) -> None:
        """`wanted` is going to be compared with each item of `where`."""
        if isinstance(where, _LISTS) and (isinstance(wanted, _NESTED) or _heft(wanted) > _ELEMENT):
            self.weigh(where)  # a comparison goes no further than either end
        elif not hasattr(where, "__len__") and _heft(wanted) > _ELEMENT:
            raise SecurityError("such a value is looked for in lists only")
        self.charge(_heft(where))

    def cut(self, value, *bounds):
        """`value[begin:end:step]`"""
        self.charge(_heft(value))
        return value[slice(*bounds)]

    def getattr(self, obj, attribute):
        """`obj.attribute`, which in templates is mostly `message.role`: a key, as dicts have no such attribute."""
        if type(obj) is dict and attribute in obj and attribute not in _DICT:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call(self, context, obj, /, *args, **kwargs):
        self.tick()
        if any(isinstance(value, tuple) for value in args):
            self.tuple(args)
        if isinstance(obj, (BuiltinMethodType, MethodType)) or hasattr(obj, "__wrapped__"):
            method = getattr(obj, "__wrapped__", obj)  # the sandbox puts a function of its own around str.format
            args = self._method(method.__self__, method.__name__, args, kwargs)
        return self.checked(super().call(context, obj, *args, **kwargs))

    def _method(self, owner: object, name: str, args: tuple, kwargs: dict) -> tuple:
        """Whether a method may be called, and its arguments."""
        known = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), None)
        if known is None:
            if owner is self or isinstance(owner, Extension) or type(owner).__module__.startswith("jinja2."):
                for value in args if isinstance(owner, LoopContext) else ():
                    self.shown(value)  # loop.changed compares
                return args
        elif name in known:
            if isinstance(owner, str):
                return self._string(owner, name, args, kwargs)
            if name in ("count", "index"):
                self._search(args[0] if args else None, owner)
            return args
        raise SecurityError(f"templates have no use for the method {name} of {type(owner).__name__}")

    def _string(self, text: str, name: str, args: tuple, kwargs: dict) -> tuple:
        """The arguments of a method of `text` that is going to be called."""
        if name == "join" and args and not isinstance(args[0], str):
            args = (list(self.each(args[0])), *args[1:])
            self.characters(sum(len(item) for item in args[0] if isinstance(item, str)) + len(text) * len(args[0]))
        given = [*args, *kwargs.values()]
        size = sum(self.weigh(value) for value in given)
        numbers = sum(abs(value) for value in given if isinstance(value, int))
        if name in ("center", "ljust", "rjust", "zfill"):
            self.characters(numbers)
        elif name == "expandtabs":
            self.characters(text.count("\t") * numbers)
        elif name in ("format", "format_map"):
            self._format("{", text, size)
        elif name == "replace":
            self._replacing(text, *args[:2])
        elif name in _SEARCHING_BACK:
            self.charge(len(text) * size)
        self.charge(_heft(text))
        return args

    def _format(self, sign: str, text: str, size: int) -> None:
        """`text` is a format of values that have `size` characters."""
        if _WIDTH[sign].search(text):
            raise SecurityError("a format with such a width")
        self.characters(len(text) + text.count(sign) * size)

    def _replacing(self, text: str, old: object = None, new: object = None) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.characters(len(text) + text.count(old) * max(0, len(new) - len(old)))

    def call_binop(self, context, operator, left, right):
        if (isinstance(left, int) and isinstance(right, (int, float))) or isinstance(left, float):
            self._number(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            self._format("%", left, self.weigh(right))
        elif operator == "*":
            sequence, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if hasattr(sequence, "__len__") and isinstance(times, int):
                (self.characters if isinstance(sequence, str) else self.elements)(len(sequence) * times)
        return self.checked(super().call_binop(context, operator, left, right))

    def _number(self, operator: str, left: object, right: object) -> None:
        if operator == "**" and isinstance(right, (int, float)) and right > 64:
            raise SecurityError("an exponent is above 64")
        if isinstance(left, int) and isinstance(right, int):
            bits = {"**": left.bit_length() * right, "*": left.bit_length() + right.bit_length()}.get(operator, 0)
            if bits > MAX_BITS:
                raise SecurityError(f"an integer has more than {MAX_BITS} bits")

    def _raise(self, message):
        raise Raised(str(self.shown(message)))

    def _strftime(self, form: str) -> str:
        if len(form) > 1000 or re.search(r"\d{3}", form):
            raise SecurityError("a format with such a width")
        return self._today.strftime(form)


def _heft(value: object) -> int:
    """What one pass over `value` costs."""
    if isinstance(value, str):
        return len(value) + (_ELEMENT * len(value.runs) if type(value) is Text else 0)
    return _ELEMENT * len(value) if isinstance(value, (list, tuple, dict, range, *_VIEWS)) else _ELEMENT


# ---------------------------------------------------------------------------------------------------------------- filters


def _tojson(env: Environment, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers has it: no HTML escapes, spaces as json.dumps puts them."""
    for part in (indent, *(separators or ())):
        if (len(part) if isinstance(part, str) else part or 0) > 32:
            raise SecurityError("JSON is indented by at most 32 characters")
    env.weigh(value)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:  # at once: at most six characters for one, and a few for each element
        text = encoder.encode(value)
    else:
        pieces, size = [], 0
        for piece in encoder.iterencode(value):
            env.charge(_ELEMENT + len(piece))
            size += len(piece)
            env.characters(size)
            pieces.append(piece)
        text = "".join(pieces)
    sources = set(sources_of(value))
    return mark(text, sources.pop()) if len(sources) == 1 else text


def _join(env: Environment, value, d="", attribute=None):
    items = env.each(value) if attribute is None else map(make_attrgetter(env, attribute), env.each(value))
    between, pieces, size = str(d), [], 0
    for item in items:
        pieces += (between, str(env.shown(item)))
        size += len(between) + len(pieces[-1])
        env.characters(size)
    return join(pieces[1:])


def _replace(env: Environment, value, old, new, count=None):
    text, old, new = str(value), str(old), str(new)
    env._replacing(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _trim(env: Environment, value, chars=None):
    text = str(value)
    env.charge(len(text) * len(chars or ""))
    return text.strip(chars)


def _indent(env: Environment, value, width=4, first=False, blank=False):
    env.characters(len(value) + (value.count("\n") + 2) * (len(width) if isinstance(width, str) else width))
    return FILTERS["indent"](value, width, first, blank)


def _short(function: Callable) -> Callable:
    """A filter that makes a number of text."""

    def call(env: Environment, value, *args, **kwargs):
        if isinstance(value, str) and len(value) > 1000:
            raise SecurityError("a number has more than 1000 characters")
        return function(value, *args, **kwargs)

    return call


def _round(env: Environment, value, precision=0, method="common"):
    if abs(precision) > 100:
        raise SecurityError("more than 100 digits")
    return FILTERS["round"](value, precision, method)


_OWN = {
    "tojson": _tojson,
    "join": _join,
    "replace": _replace,
    "trim": _trim,
    "indent": _indent,
    "int": _short(FILTERS["int"]),
    "float": _short(FILTERS["float"]),
    "round": _round,
}
_ONE_BY_ONE = frozenset(("list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "sort", "unique"))
_TEXTUAL = frozenset(("capitalize", "float", "indent", "int", "lower", "replace", "safe", "string", "title", "trim", "upper"))
_DEEP = _TEXTUAL | {"dictsort", "max", "min", "sort", "unique"}  # go through all that is in a value
_ATTRIBUTE = {"join": 1, "max": 1, "min": 1, "rejectattr": 0, "selectattr": 0, "sort": 2, "unique": 1}  # which argument may name one
_SHORT = ("abs", "count", "d", "default", "dictsort", "first", "items", "last", "length", "reverse")
_FILTERS: dict[str, Callable] = {name: FILTERS[name] for name in (*_SHORT, *_ONE_BY_ONE, *_TEXTUAL)} | _OWN


def _filter(name: str, function: Callable) -> Callable:
    """The filter as templates have it. (`pass_context`: so that none is called when the template is compiled.)"""
    passed = _PassArg.from_obj(function)

    @pass_context
    def call(context, value, *args, **kwargs):
        env: Environment = context.environment
        env.charge(_TURN + _heft(value))
        env.weigh([*args, *kwargs.values()])
        at = _ATTRIBUTE.get(name, -1)
        for path in (kwargs.get("attribute"), args[at] if 0 <= at < len(args) else None):
            if isinstance(path, str) and len(path) > 200:
                raise SecurityError("the name of an attribute has more than 200 characters")
        if name in _ONE_BY_ONE and value:
            value = env.each(value)
            if name in _DEEP:
                value = list(value)
        if name in _DEEP:
            env.shown(value)
        first = {_PassArg.context: [context], _PassArg.eval_context: [context.eval_ctx], _PassArg.environment: [env]}.get(passed, [])
        result = function(*([env] if name in _OWN else first), value, *args, **kwargs)
        return env.each(result) if inspect.isgenerator(result) else env.checked(result)

    return call


def _compared(name: str) -> Callable:
    return pass_context(lambda context, a, b: context.environment.compare(name, a, b))


def _of_text(name: str) -> Callable:
    return pass_context(lambda context, value: TESTS[name](context.environment.shown(value)))


_TESTS = {name: _of_text(name) for name in ("lower", "upper")} | {
    name: _compared(kind)
    for kind, names in {
        "eq": ("eq", "equalto", "=="),
        "ne": ("ne", "!="),
        "gt": ("gt", "greaterthan", ">"),
        "gteq": ("ge", ">="),
        "lt": ("lt", "lessthan", "<"),
        "lteq": ("le", "<="),
        "in": ("in",),
    }.items()
    for name in names
}
