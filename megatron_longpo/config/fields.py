"""What a config data class says about its settings: keys, types, defaults, limits, meaning.

Every command has a config: a data class with a docstring under each field. This file reads such a
class. It knows no command, and imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object

from megatron_longpo.errors import UserError

LIMITS = "limits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The range of a number, or of every number of a list; None = no bound on that side."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def hold(self, number: float) -> bool:
        """Returns whether a number is within the range; nan and infinity never are."""
        return (
            math.isfinite(number)
            and (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = {
            "above": self.above,
            "at least": self.at_least,
            "below": self.below,
            "at most": self.at_most,
        }
        return " and ".join(
            f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None
        )


def limits(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> dict[str, Limits]:
    """Returns field metadata: `beta: float = field(default=0.1, metadata=limits(above=0))`."""
    return {LIMITS: Limits(above=above, at_least=at_least, below=below, at_most=at_most)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One key of a config."""

    key: str
    """Dotted, as in the YAML and on the command line: `optimizer.lr`."""
    annotation: Any
    required: bool
    default: Any
    """None where `required`."""
    meaning: str
    """The docstring under the field, on one line."""
    limits: Limits | None
    is_section: bool
    """Whether it is a section: it has keys of its own, and if optional it may be null."""


def is_optional(annotation: Any) -> bool:
    """Returns whether null is allowed: `int | None`."""
    return type(None) in get_args(annotation)


def without_none(annotation: Any) -> Any:
    """Returns a type without its null: `int | None -> int`."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    members = tuple(member for member in get_args(annotation) if member is not type(None))
    return members[0] if len(members) == 1 else Union[members]  # noqa: UP007 (built at run time)


@functools.cache  # it parses the source of the class, and a resolved config needs it again
def field_meanings(config_class: type) -> Mapping[str, str]:
    """Returns the docstring of every field, by the field's name, on one line."""
    described = [
        param
        for owner in reversed(config_class.__mro__)
        if dataclasses.is_dataclass(owner)
        for param in parse_from_object(owner).params
    ]
    return {param.arg_name: " ".join((param.description or "").split()) for param in described}


def settings_of(config_class: type, prefix: str = "") -> dict[str, Setting]:
    """Returns every key of a config class, in the order of the class, a section before its keys."""
    hints = get_type_hints(config_class)
    meanings = field_meanings(config_class)
    settings: dict[str, Setting] = {}
    for field in dataclasses.fields(config_class):
        annotation = hints[field.name]
        section = without_none(annotation)
        is_section = dataclasses.is_dataclass(section)
        has_factory = field.default_factory is not dataclasses.MISSING
        has_default = field.default is not dataclasses.MISSING or has_factory
        default = field.default if field.default is not dataclasses.MISSING else None
        if has_factory and not is_section:
            assert field.default_factory is not dataclasses.MISSING
            default = field.default_factory()
        meaning = meanings.get(field.name, "")
        if is_section and not meaning:
            meaning = " ".join((section.__doc__ or "").split("\n\n")[0].split())
        key = prefix + field.name
        settings[key] = Setting(
            key=key,
            annotation=annotation,
            required=not has_default and not is_section,
            default=default,
            meaning=meaning,
            limits=field.metadata.get(LIMITS),
            is_section=is_section,
        )
        if is_section:
            settings.update(settings_of(section, key + "."))
    return settings


def optional_section_of(key: str, settings: Mapping[str, Setting]) -> str | None:
    """Returns the section around `key` that may be null (`lora.rank -> lora`), or None."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        section = settings.get(".".join(parts[:length]))
        if section is not None and section.is_section and is_optional(section.annotation):
            return section.key
    return None


def flat_values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `(key, value)` of every setting of a config; a null section yields itself."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat_values(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def check_limits(config: Any, origins: Mapping[str, str] | None = None) -> None:
    """Raises UserError for the first number out of its range, also in a list.

    `origins` names a key as its user set it (`train.yaml:12: optimizer.lr`), for the message.
    """
    settings = settings_of(type(config))
    for key, value in flat_values(config):
        origin = (origins or {}).get(key, key)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check_number(number, settings[key], origin)


def _check_number(number: float, setting: Setting, origin: str) -> None:
    if setting.limits is None:
        if not math.isfinite(number):
            raise UserError(f"{origin} ({number}) must be a finite number")
    elif not setting.limits.hold(number):
        remedy = ""
        if not setting.required:
            remedy = f". The default is {default_text(setting.default)}"
        raise UserError(f"{origin} ({_shown(number)}) must be {setting.limits}{remedy}")


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def expected(annotation: Any) -> str:
    """Returns what a user may write: `one of bf16, fp32`, `an integer or null`."""
    inner = without_none(annotation)
    origin = get_origin(inner)
    if origin is Literal:
        text = "one of " + ", ".join(str(choice) for choice in get_args(inner))
    elif origin in (Union, types.UnionType):
        text = " or ".join(expected(member) for member in get_args(inner))
    elif origin in (list, tuple):
        text = "a list, each item " + expected(get_args(inner)[0])
    elif origin is dict or inner is dict or dataclasses.is_dataclass(inner):
        text = "an object (key: value)"
    else:
        words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
        text = words.get(inner, "a value")
    return text + " or null" if is_optional(annotation) else text


def accepts(annotation: Any, node: yaml.Node) -> bool:
    """Returns whether a YAML node has the annotated type, the keys of a section apart."""
    tag = node.tag.rpartition(":")[2]
    if tag == "null":
        return is_optional(annotation) or annotation is Any
    inner = without_none(annotation)
    origin = get_origin(inner)
    if inner is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(accepts(member, node) for member in get_args(inner))
    if origin in (list, tuple):
        member = get_args(inner)[0]
        return isinstance(node, yaml.SequenceNode) and all(accepts(member, n) for n in node.value)
    if origin is dict or inner is dict or dataclasses.is_dataclass(inner):
        return isinstance(node, yaml.MappingNode)
    if not isinstance(node, yaml.ScalarNode):
        return False
    if origin is Literal:
        return node.value in [str(choice) for choice in get_args(inner)]
    if inner is float:
        return tag in ("int", "float") or (not node.style and _is_float(node.value))
    return tag == {bool: "bool", int: "int", str: "str"}.get(inner, tag)


def takes_text(annotation: Any) -> bool:
    """Returns whether any text is accepted (`str | None`), so that 123 means "123"."""
    inner = without_none(annotation)
    return inner is str or str in get_args(inner)


def _is_float(text: str) -> bool:
    # YAML 1.1 reads 5e-7 (no point) as text; everybody means the number.
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def default_text(value: Any) -> str:
    """Returns a default as it is written in YAML: `null`, `true`, `5e-7`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(default_text(item) for item in value) + "]"
    return str(value)
