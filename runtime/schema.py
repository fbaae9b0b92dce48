"""What a config may contain, read off its dataclasses.

A section is a frozen dataclass; a field is a key:

    rank: Annotated[int, "Rank of the update."] = 16                a value: bool, int, float, str, Literal[...], tuple[T, ...],
                                                                    dict[str, T], or a union of these such as str | tuple[str, ...]
    name: Annotated[str | None, "..."] = None                       absent unless given
    model: ModelConfig                                              a section; absent means empty: every key at its default
    lora: LoraConfig | None = None                                  a section that is off when absent
    sources: tuple[SourceConfig, ...] = ()                          an array of tables
    schedule: ConstantConfig | CosineConfig = CosineConfig()        one of several, told apart by their `kind: Literal[...]`

The first string of `Annotated` documents the key; further ones are names the key has elsewhere ("learning_rate" for `lr`),
used only to answer someone who types them. A trailing underscore is dropped from the name (`async_` is the key `async`).
None has no spelling in TOML, so a field that can be None must default to it: then every config can be written down.

The set of sections is closed: nothing here, and nothing a config says, imports or calls by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, cached_property
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from runtime.toml import literal

REQUIRED = object()


class Mismatch(Exception):
    """A value does not have the type of its key. `place` is relative to the value: indices into arrays."""

    def __init__(self, expected: Type, value: object, place: tuple = ()):
        self.expected, self.value, self.place = expected, value, place


class Type(ABC):
    """The type of a value.

    name: for `--help`; expected: what a message asks for, plural: several of it; example: a legal value; json: its JSON schema.
    """

    name: str
    expected: str
    plural: str = "values"
    example: object
    json: dict

    @abstractmethod
    def read(self, value: object) -> object:
        """The value as the dataclass holds it. Raises Mismatch."""


@dataclass(frozen=True)
class Scalar(Type):
    python: type

    name = property(lambda self: self.python.__name__)
    expected = property(lambda self: {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[self.python])
    plural = property(lambda self: {bool: "booleans", int: "integers", float: "numbers", str: "strings"}[self.python])
    example = property(lambda self: {bool: True, int: 1, float: 0.5, str: "text"}[self.python])
    json = property(lambda self: {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[self.python]})

    def read(self, value):
        if type(value) is self.python:
            return value
        if self.python is float and type(value) is int:
            return float(value)
        raise Mismatch(self, value)


@dataclass(frozen=True)
class Choice(Type):
    values: tuple

    name = property(lambda self: " | ".join(literal(v) for v in self.values))
    expected = property(lambda self: any_of([literal(v) for v in self.values]))
    plural = name
    example = property(lambda self: self.values[0])
    json = property(lambda self: {"enum": list(self.values)})

    def read(self, value):
        if any(type(value) is type(v) and value == v for v in self.values):
            return value
        raise Mismatch(self, value)


@dataclass(frozen=True)
class Array(Type):
    item: Type

    name = property(lambda self: f"[{self.item.name}, ...]")
    expected = property(lambda self: f"an array of {self.item.plural}")
    example = property(lambda self: [self.item.example])
    json = property(lambda self: {"type": "array", "items": self.item.json})

    def read(self, value):
        if not isinstance(value, list):
            raise Mismatch(self, value)
        return tuple(_inside(i, self.item, item) for i, item in enumerate(value))


@dataclass(frozen=True)
class Dict(Type):
    item: Type

    name = property(lambda self: f"{{name = {self.item.name}}}")
    expected = property(lambda self: f"a table of {self.item.plural}")
    example = property(lambda self: {"name": self.item.example})
    json = property(lambda self: {"type": "object", "additionalProperties": self.item.json})

    def read(self, value):
        if not isinstance(value, dict):
            raise Mismatch(self, value)
        return {key: _inside(key, self.item, item) for key, item in value.items()}


@dataclass(frozen=True)
class Either(Type):
    options: tuple[Type, ...]

    name = property(lambda self: " or ".join(option.name for option in self.options))
    expected = property(lambda self: any_of([option.expected for option in self.options]))
    example = property(lambda self: self.options[0].example)
    json = property(lambda self: {"anyOf": [option.json for option in self.options]})

    def read(self, value):
        inner = None
        for option in self.options:
            try:
                return option.read(value)
            except Mismatch as error:
                inner = inner or (error if error.place else None)
        raise inner or Mismatch(self, value)  # an array with a wrong item: name the item


def _inside(part, item: Type, value: object) -> object:
    try:
        return item.read(value)
    except Mismatch as error:
        raise Mismatch(error.expected, error.value, (part, *error.place)) from None


@dataclass(frozen=True)
class Key:
    """One key of a section: a value (`type`), or a table or array of tables (`sections`; several: told apart by `kind`)."""

    name: str
    field: str  # the dataclass's name for it
    doc: str
    aka: tuple[str, ...]
    default: object
    optional: bool  # None is legal
    many: bool  # an array of tables
    type: Type | None
    sections: tuple[Section, ...]

    @cached_property
    def tags(self) -> dict[str, Section]:
        """Section by `kind`, where there are several."""
        return {tag: section for section in self.sections for tag in section.keys["kind"].type.values}

    @property
    def default_kind(self) -> str:
        """What an absent `kind` means: the kind of the field's default, else the first."""
        for tag, section in self.tags.items():
            if type(self.default) is section.cls:
                return tag
        return next(iter(self.tags))


@dataclass(frozen=True)
class Section:
    """One dataclass as a table of keys."""

    cls: type
    doc: str
    keys: dict[str, Key]

    def __hash__(self):
        return hash(self.cls)


@cache
def section(cls: type) -> Section:
    """The keys of a config dataclass. Assertions here are for whoever writes one."""
    hints = get_type_hints(cls, include_extras=True)
    keys = [_key(f"{cls.__name__}.{f.name}", f, hints[f.name]) for f in fields(cls)]
    doc = " ".join((cls.__doc__ or "").split())
    assert doc and not doc.startswith(f"{cls.__name__}("), f"{cls.__name__} needs a docstring: it is the section's documentation"
    return Section(cls, doc, {key.name: key for key in keys})


def _key(label: str, field, hint) -> Key:
    notes: tuple[str, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
    options = _options(hint)
    optional = NoneType in options
    options = tuple(option for option in options if option is not NoneType)
    many = len(options) == 1 and get_origin(options[0]) is tuple and all(is_dataclass(c) for c in _options(get_args(options[0])[0]))
    if many:
        options = _options(get_args(options[0])[0])
    sections = tuple(section(option) for option in options) if all(is_dataclass(option) for option in options) else ()
    kind = None if sections else _type(options, label)
    default = field.default if field.default is not MISSING else REQUIRED
    if field.default_factory is not MISSING:
        default = field.default_factory()

    assert notes or sections, f"{label} needs documentation: Annotated[..., 'one line']"
    assert not optional or default is None, f"{label} can be None, which TOML cannot say, so it must default to None"
    assert len(sections) < 2 or all("kind" in s.keys for s in sections), f"{label}: sections of a union need a kind: Literal[...]"
    if sections and not many and default is not REQUIRED and default is not None:
        assert default == type(default)(), f"{label}: a default section must be the class's own defaults, as an empty table means those"
    return Key(
        name=field.name.rstrip("_"),
        field=field.name,
        doc=notes[0] if notes else "",
        aka=tuple(notes[1:]),
        default=default,
        optional=optional,
        many=many,
        type=kind,
        sections=sections,
    )


def _options(hint) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _type(options: tuple, label: str) -> Type:
    types = []
    for option in options:
        origin, args = get_origin(option), get_args(option)
        if option in (bool, int, float, str):
            types.append(Scalar(option))
        elif origin is Literal:
            types.append(Choice(args))
        elif origin is tuple and len(args) == 2 and args[1] is Ellipsis:
            types.append(Array(_type(_options(args[0]), label)))
        elif origin is dict and args[0] is str:
            types.append(Dict(_type(_options(args[1]), label)))
        else:
            raise AssertionError(f"{label}: a config cannot hold {option}")
    return types[0] if len(types) == 1 else Either(tuple(types))


def any_of(words: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
