"""`--help` and `--print_config`, written from a command's config class."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from megatron_longpo.config.fields import Setting, default_text, expected, is_optional, settings_of
from megatron_longpo.config.megatron_flags import suggestion
from megatron_longpo.errors import UserError

WIDTH = 100


def help_text(
    config_class: type,
    *,
    command: str,
    summary: str,
    positionals: Sequence[str],
    extra_options: Sequence[tuple[str, str]],
    examples: Sequence[str],
) -> str:
    """Returns the whole `--help` of a command: usage, examples, every setting with its default."""
    settings = settings_of(config_class)
    arguments = "".join(f"{key.upper()} " for key in positionals if key in settings)
    sections = any(setting.is_section for setting in settings.values())
    option = "--section.key VALUE" if sections else "--key VALUE"
    lines = [
        f"usage: longpo {command} {arguments}[--config X.yaml] [{option} ...]",
        "",
        *textwrap.wrap(summary, WIDTH),
        "",
        "examples:",
        *(f"  {example}" for example in examples),
        "",
        "options:",
        *_entry("--help [SECTION]", _help_meaning(settings)),
        *_entry(
            "--config FILE",
            "YAML file of the settings below. Options win over files.",
        ),
        *_entry("--print_config", "Print all settings as YAML, with meaning and default."),
    ]
    for option_name, meaning in extra_options:
        lines += _entry(option_name, meaning)
    if not sections:
        lines += ["", "settings:"]
    return "\n".join([*lines, *_settings_lines(settings.values())])


def section_text(config_class: type, name: str, *, command: str) -> str:
    """Returns the help of one section (`optimizer`, `evaluation.nll`) or of one key.

    Raises:
        UserError: if there is no such section or key; the message names the nearest.
    """
    settings = settings_of(config_class)
    key = name if name in settings else name.replace("-", "_")
    if key not in settings:
        hint = suggestion(key, list(settings))
        raise UserError(f"--help {name}: longpo {command} has no such section or key. {hint}")
    found = [s for s in settings.values() if s.key == key or s.key.startswith(f"{key}.")]
    return "\n".join(_settings_lines(found)).lstrip("\n")


def _help_meaning(settings: Mapping[str, Setting]) -> str:
    section = next((key for key, setting in settings.items() if setting.is_section), None)
    example = next(iter(settings)) if section is None else section
    return f"Show this text, or one section or key of it, such as --help {example}."


def _settings_lines(settings: Iterable[Setting]) -> list[str]:
    lines: list[str] = []
    for setting in settings:
        if setting.is_section:
            optional = (
                " (null, or an object with these keys)" if is_optional(setting.annotation) else ""
            )
            lines += ["", *textwrap.wrap(f"{setting.key}{optional}: {setting.meaning}", WIDTH)]
        else:
            lines += _entry(f"--{setting.key}", f"{setting.meaning} [{value_note(setting)}]")
    return lines


def _entry(option: str, meaning: str) -> list[str]:
    first = f"  {option}"
    return [
        first,
        *textwrap.wrap(meaning, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8),
    ]


def value_note(setting: Setting) -> str:
    """Returns what may be written there, and the default: `a number, at least 0; default 1`."""
    wanted = expected(setting.annotation)
    if setting.limits is not None and str(setting.limits):
        wanted += f", {setting.limits}"
    if setting.required:
        return f"{wanted}; required"
    return f"{wanted}; default {default_text(setting.default)}"


def config_text(config_class: type, values: dict[str, Any]) -> str:
    """Returns settings as YAML with comments, which `--config` can read."""
    lines: list[str] = []
    settings = settings_of(config_class)
    hidden: tuple[str, ...] = ()
    for setting in settings.values():
        if hidden and setting.key.startswith(hidden):
            continue
        *parents, name = setting.key.split(".")
        indent = "  " * len(parents)
        value: Any = values
        for part in (*parents, name):
            value = value.get(part)
        if setting.is_section and not parents and lines:
            lines.append("")
        note = "" if setting.is_section else f" [{value_note(setting)}]"
        width = WIDTH - len(indent) - 2
        lines += [f"{indent}# {line}" for line in textwrap.wrap(setting.meaning + note, width)]
        if setting.is_section and value is not None:
            lines.append(f"{indent}{name}:")
        else:
            lines.append(f"{indent}{name}: {_inline(value)}")
            hidden = (*hidden, setting.key + ".")
    return "\n".join(lines)


def _inline(value: Any) -> str:
    """Returns a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False)
    return text.removesuffix("...\n").strip()
