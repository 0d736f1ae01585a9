"""From `--config X.yaml --section.key value` to the config of any command.

jsonargparse does the parsing. Every key and value is checked before, while the lines of the YAML
are known, so that a mistake is answered in one line with file, line, key and remedy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from megatron_longpo.config.fields import (
    Setting,
    accepts,
    check_limits,
    expected,
    is_optional,
    optional_section_of,
    settings_of,
    takes_text,
    without_none,
)
from megatron_longpo.config.megatron_flags import suggestion
from megatron_longpo.errors import UserError

Config = TypeVar("Config")


RECORDED_KEYS = ("versions", "fingerprints")
"""Keys that a run adds to its config.yaml. They are no settings, and are ignored when the file
starts another run."""


class _Parser(ArgumentParser):
    """jsonargparse's parser, with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if isinstance(ex, UserError):
            raise ex
        raise UserError(" ".join(str(message).split()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """A checked command line."""

    options: list[str]
    """Every option as `--key=value`."""
    origins: dict[str, str] = field(default_factory=dict)
    """Key -> the key as its user set it: `train.yaml:12: optimizer.lr` or `--optimizer.lr`."""


def load_config(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    command: str,
    positionals: Sequence[str] = (),
    resolve: Callable[[Config], Config] | None = None,
) -> Config:
    """Parses a command line, checks types and ranges, and returns the config.

    Args:
        config_class: the data class of the command's settings.
        argv: the command line after the command's name.
        command: the command's name, for messages.
        positionals: keys that may be given by position, in this order. A last one that is a list
            takes all arguments that are left.
        resolve: checks the settings against each other and fills what depends on others. Its
            messages get file and line, too.

    Raises:
        UserError: for the first mistake.
    """
    settings = settings_of(config_class)
    arguments = check_arguments(argv, settings, positionals)
    _check_required(settings, arguments.origins, positionals)
    parser = build_parser(config_class, command=command)
    parsed = parser.parse_args(arguments.options)
    config = _build(config_class, parser.instantiate(parsed))
    check_limits(config, arguments.origins)
    if resolve is None:
        return config
    with _naming_origins(arguments.origins):
        return resolve(config)


@contextlib.contextmanager
def _naming_origins(origins: Mapping[str, str]) -> Iterator[None]:
    """Puts file and line before messages raised within, which begin with the key they are about."""
    try:
        yield
    except UserError as error:
        message = str(error)
        key = _FIRST_KEY.match(message)
        if key is None or key[0] not in origins:
            raise
        raise UserError(origins[key[0]] + message[key.end() :]) from None


_FIRST_KEY = re.compile(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*")


def unchecked_values(
    config_class: type, argv: Sequence[str], *, command: str, positionals: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns settings as nested dicts, from files, options and defaults; None if not given."""
    arguments = check_arguments(argv, settings_of(config_class), positionals)
    parser = build_parser(config_class, command=command)
    printed = io.StringIO()
    # jsonargparse leaves required settings out of account only where it prints.
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parser.parse_args([*arguments.options, "--print_config"])
    return yaml.safe_load(printed.getvalue())


def build_parser(config_class: type, *, command: str) -> ArgumentParser:
    """Returns the jsonargparse parser of a config class, without its help: help.py writes that."""
    parser = _Parser(prog=f"longpo {command}", add_help=False)
    parser.add_argument("--config", action=ActionConfigFile)
    settings = settings_of(config_class)
    for config_field in dataclasses.fields(config_class):
        setting = settings[config_field.name]
        section = without_none(setting.annotation)
        if setting.is_section and not is_optional(setting.annotation):
            # Section by section and without default objects, which jsonargparse cannot read
            # where a dataclass has slots.
            parser.add_class_arguments(section, config_field.name)
        else:
            default = {} if setting.required else {"default": setting.default}
            parser.add_argument(
                f"--{config_field.name}",
                type=setting.annotation,
                required=setting.required,
                **default,
            )
    for key in RECORDED_KEYS:
        parser.add_argument(f"--{key}", type=dict | None, default=None)
    return parser


def _build(config_class: type[Config], parsed: Namespace) -> Config:
    return config_class(
        **{f.name: parsed[f.name] for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    )


def check_arguments(
    argv: Sequence[str], settings: Mapping[str, Setting], positionals: Sequence[str] = ()
) -> Arguments:
    """Checks a command line, and the YAML files that it names, against the settings."""
    arguments = Arguments(options=[])
    given: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token == "--":
            given += tokens
            break
        if not token.startswith("-") or token == "-":
            given.append(token)
            continue
        name, has_value, value = token.lstrip("-").partition("=")
        key = _known_key(token.partition("=")[0], name, settings)
        if not has_value:
            value = _next_value(key, tokens, settings)
        _check_option(key, value, settings, arguments)
    _check_positionals(given, settings, positionals, arguments)
    return arguments


def _known_key(option: str, name: str, settings: Mapping[str, Setting]) -> str:
    name = name if name in settings else name.replace("-", "_")
    if option.startswith("--") and (name == "config" or name in settings):
        return name
    parent = name.rpartition(".")[0]
    if option.startswith("--") and parent in settings and _is_object(settings[parent]):
        # One item of it: --model.rope_scaling.factor 8.
        return name
    raise UserError(f"{option}: no such option. {suggestion(name, _value_keys(settings))}")


def _is_object(setting: Setting) -> bool:
    return get_origin(without_none(setting.annotation)) is dict


def _value_keys(settings: Mapping[str, Setting]) -> Collection[str]:
    return [
        key
        for key, setting in settings.items()
        if not setting.is_section or is_optional(setting.annotation)
    ]


def _next_value(key: str, tokens: list[str], settings: Mapping[str, Setting]) -> str:
    """Takes the value that follows an option; a true-or-false option without one means true."""
    is_switch = key in settings and without_none(settings[key].annotation) is bool
    if is_switch and (not tokens or not accepts(settings[key].annotation, _text_node(tokens[0]))):
        return "true"
    if not tokens or tokens[0].startswith("--"):
        what = expected(settings[key].annotation) if key in settings else "a value"
        raise UserError(f"--{key} needs a value: {'a file' if key == 'config' else what}")
    return tokens.pop(0)


def _text_node(text: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    return node or yaml.ScalarNode("tag:yaml.org,2002:str", text)


def _check_option(
    key: str, value: str, settings: Mapping[str, Setting], arguments: Arguments
) -> None:
    if key == "config":
        files = sum(option.startswith("--config=") for option in arguments.options)
        found = check_yaml(value, settings)
        if found:  # jsonargparse refuses a file of nothing but comments
            # Files first: an option wins over a file wherever it stands.
            arguments.options.insert(files, f"--config={value}")
        arguments.origins.update({k: v for k, v in found.items() if not _is_option(k, arguments)})
        return
    setting = settings.get(key)
    if setting is not None:
        node = _text_node(value)
        if setting.is_section and not is_optional(setting.annotation):
            inside = next(k for k in settings if k.startswith(key + "."))
            raise UserError(f"--{key} is a section. Set its keys, such as --{inside}")
        if not (takes_text(setting.annotation) and isinstance(node, yaml.ScalarNode)):
            _check_value(node, setting, f"--{key}", shown=value)
        if setting.is_section and isinstance(node, yaml.MappingNode):
            found = _check_mapping(node, f"--{key}", settings, prefix=f"{key}.")
            arguments.origins.update(found)
    arguments.origins[key] = f"--{key}"
    arguments.options.append(f"--{key}={value}")


def _is_option(key: str, arguments: Arguments) -> bool:
    return arguments.origins.get(key, "").startswith("--")


def _check_positionals(
    given: Sequence[str],
    settings: Mapping[str, Setting],
    positionals: Sequence[str],
    arguments: Arguments,
) -> None:
    left = list(given)
    for key in positionals:
        if not left or key not in settings:
            continue
        if get_origin(without_none(settings[key].annotation)) in (list, tuple):
            value = "[" + ", ".join(f'"{path}"' for path in left) + "]"
            left = []
        else:
            value = left.pop(0)
        _check_option(key, value, settings, arguments)
    if left:
        raise UserError(f"{left[0]}: one argument too many. Options start with --, see --help")


def check_yaml(path: str, settings: Mapping[str, Setting]) -> dict[str, str]:
    """Checks keys and types of a YAML file, and returns `Arguments.origins` of its keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except OSError as error:
        raise UserError(f"--config ({path}): {error.strerror}. Give a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"--config ({path}): not UTF-8 text. Give a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: must be `section:` and keys under it")
    return _check_mapping(node, path, settings, loader=loader)


def _check_mapping(
    node: yaml.MappingNode,
    source: str,
    settings: Mapping[str, Setting],
    *,
    prefix: str = "",
    loader: yaml.SafeLoader | None = None,
) -> dict[str, str]:
    origins: dict[str, str] = {}
    loader = loader or yaml.SafeLoader("")
    loader.flatten_mapping(node)  # puts `<<: *anchor` in place
    for key_node, value_node in node.value:
        where = source
        if not source.startswith("--"):
            where = f"{source}:{key_node.start_mark.line + 1}"
        key = f"{prefix}{key_node.value}"
        if key in origins:
            first = origins[key].rpartition(": ")[0]
            raise UserError(f"{where}: {key} stands twice, first at {first}. Remove one")
        if key in RECORDED_KEYS:
            continue
        setting = settings.get(key)
        if setting is None:
            hint = suggestion(key, _value_keys(settings))
            raise UserError(f"{where}: {key} is not a setting. {hint}")
        _check_value(value_node, setting, f"{where}: {key}")
        origins[key] = f"{where}: {key}"
        if setting.is_section and isinstance(value_node, yaml.MappingNode):
            inside = _check_mapping(value_node, source, settings, prefix=f"{key}.", loader=loader)
            origins.update(inside)
    return origins


def _check_value(node: yaml.Node, setting: Setting, what: str, *, shown: str | None = None) -> None:
    if accepts(setting.annotation, node):
        return
    if shown is None:
        shape = "a list" if isinstance(node, yaml.SequenceNode) else "an object"
        shown = str(node.value) if isinstance(node, yaml.ScalarNode) else shape
    if setting.is_section and not shown:
        raise UserError(f"{what} is an empty section. Put keys under it, or remove the line")
    wanted = expected(setting.annotation)
    quoted = ". Put it in quotes" if wanted.startswith("text") and shown not in ("", "null") else ""
    raise UserError(f"{what} ({shown or 'empty'}) must be {wanted}{quoted}")


def _check_required(
    settings: Mapping[str, Setting], origins: Mapping[str, str], positionals: Sequence[str]
) -> None:
    for key, setting in settings.items():
        if not setting.required or key in origins:
            continue
        section = optional_section_of(key, settings)
        if section is not None and not any(k.startswith(section + ".") for k in origins):
            continue
        how = f"Give --{key} VALUE or put it into the --config file"
        if key in positionals:
            how = f"Give it as argument {positionals.index(key) + 1} or as --{key} VALUE"
        raise UserError(f"{key} is missing ({setting.meaning.rstrip('.')}). {how}")
