"""Who may import whom: every import of every file, those inside functions too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("megatron_longpo", "checkpoints_convert", "tools", "tests", "examples")

LIGHT_FILES = (
    "__main__",
    "cli",
    "config",
    "config_checks",
    "config_fields",
    "config_help",
    "config_parser",
    "errors",
    "megatron_flags",
    "data.config",
    "generation.config",
    "generation.backends.config",
    "generation.judge_config",
    "evaluation.config",
    "evaluation.evaluate_config",
    "evaluation.harness.config",
    "evaluation.harness.suites",
)
"""Files of megatron_longpo that a wrong setting, or --help, must not wait for torch in."""

HEAVY = ("torch", "transformers", "numpy", "megatron", "datasets", "matplotlib")

ROOMS: dict[str, tuple[str, ...]] = {
    "data": ("errors",),
    "generation": ("data", "config_fields", "errors", "stop"),
    "objectives": (),
    "parallel": ("data", "errors"),
    "model": ("data", "parallel", "errors", "megatron_compat"),
}
"""Package of megatron_longpo -> what of ours it may import besides itself."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Full names a file imports; `from a import b` gives `a` and `a.b`, as b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("x") and __import__("x").
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield str(name.value)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def modules_of(*folders: str) -> dict[str, set[str]]:
    """Module -> everything it imports."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = module_name(path)
            source = path.read_text(encoding="utf-8")
            found[name] = set(imports_of(source, name, is_package=path.stem == "__init__"))
    return found


SOURCE = modules_of("megatron_longpo", "checkpoints_convert")


def offences(module: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return sorted(
        name
        for name in SOURCE[module]
        if any(is_within(name, package) for package in forbidden)
        and not any(is_within(name, package) for package in allowed)
    )


def test_imports_are_seen_wherever_they_stand() -> None:
    source = (
        "import a.b as c\nfrom . import d\nfrom ..e import f\n"
        "def g():\n    from h.i import j\n    importlib.import_module('k')\n"
        "if TYPE_CHECKING:\n    import m\n"
    )
    found = set(imports_of(source, "top.middle.leaf", is_package=False))
    assert {"a.b", "top.middle.d", "top.e.f", "h.i", "h.i.j", "k", "m"} <= found
    assert "top.middle.pack.d" in set(imports_of(source, "top.middle.pack", is_package=True))


def test_the_files_are_found() -> None:
    for module in ("cli", "config", "data.rows", "objectives.longpo", "training.report"):
        assert f"megatron_longpo.{module}" in SOURCE


@pytest.mark.parametrize("room", ["data", "objectives", "generation"])
def test_these_rooms_know_neither_megatron_nor_processes(room: str) -> None:
    for module in SOURCE:
        if is_within(module, f"megatron_longpo.{room}"):
            assert not offences(module, ("megatron", "torch.distributed")), module


@pytest.mark.parametrize("room", list(ROOMS))
def test_rooms_import_only_what_they_may(room: str) -> None:
    allowed = tuple(f"megatron_longpo.{name}" for name in (room, *ROOMS[room]))
    for module in SOURCE:
        if is_within(module, f"megatron_longpo.{room}"):
            # The package itself holds nothing but the version.
            assert set(offences(module, OURS, allowed)) <= {"megatron_longpo"}, module


def test_only_parallel_knows_megatron_s_groups() -> None:
    for module in SOURCE:
        if not is_within(module, "megatron_longpo.parallel"):
            found = [name for name in SOURCE[module] if "parallel_state" in name.split(".")]
            assert not found, module


@pytest.mark.parametrize("name", LIGHT_FILES)
def test_settings_and_commands_import_nothing_heavy(name: str) -> None:
    assert not offences(f"megatron_longpo.{name}", HEAVY)


def test_the_converters_settings_import_nothing_heavy() -> None:
    assert not offences("checkpoints_convert.config", HEAVY)


def test_the_packages_do_not_need_tests_tools_or_examples() -> None:
    for module in SOURCE:
        assert not offences(module, ("tests", "tools", "examples")), module
