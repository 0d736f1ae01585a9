"""`--help` and `--print_config`, written from a command's config class."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from megatron_longpo.config.fields import Setting, default_text, expected, is_optional, settings_of

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
    """The whole `--help` of a command: usage, examples, and every setting with its default."""
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
        *_entry("--help", "Show this text."),
        *_entry("--config FILE", "YAML file of the settings below; options win over it."),
        *_entry("--print_config", "Print all settings as YAML, with meaning and default."),
    ]
    for option_name, meaning in extra_options:
        lines += _entry(option_name, meaning)
    if not sections:
        lines += ["", "settings:"]
    for setting in settings.values():
        if setting.is_section:
            optional = (
                " (null, or an object with these keys)" if is_optional(setting.annotation) else ""
            )
            lines += ["", f"{setting.key}{optional}: {setting.meaning}"]
        else:
            lines += _entry(f"--{setting.key}", f"{setting.meaning} [{_value_note(setting)}]")
    return "\n".join(lines)


def _entry(option: str, meaning: str) -> list[str]:
    first = f"  {option}"
    return [
        first,
        *textwrap.wrap(meaning, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8),
    ]


def _value_note(setting: Setting) -> str:
    wanted = expected(setting.annotation)
    if setting.limits is not None and str(setting.limits):
        wanted += f", {setting.limits}"
    return f"{wanted}; required" if setting.required else f"{wanted}; default {_default(setting)}"


def _default(setting: Setting) -> str:
    return default_text(setting.default)


def config_text(config_class: type, values: dict[str, Any]) -> str:
    """Settings as commented YAML that `--config` reads back."""
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
        note = "" if setting.is_section else f" [{_value_note(setting)}]"
        width = WIDTH - len(indent) - 2
        lines += [f"{indent}# {line}" for line in textwrap.wrap(setting.meaning + note, width)]
        if setting.is_section and value is not None:
            lines.append(f"{indent}{name}:")
        else:
            lines.append(f"{indent}{name}: {_inline(value)}")
            hidden = (*hidden, setting.key + ".")
    return "\n".join(lines)


def _inline(value: Any) -> str:
    """One value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False)
    return text.removesuffix("...\n").strip()
