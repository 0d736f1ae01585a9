"""The table of rooms: who may import whom, and that every import keeps to it.

Every import of every file counts: those inside functions, relative ones, and those under
`TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("megatron_longpo", "checkpoints_convert", "tools", "tests", "examples")

ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "runtime": ("errors",),
    "config": ("errors",),
    "objectives": ("errors", "config"),
    "data": ("errors", "config"),
    "generation": ("errors", "runtime", "config", "data"),
    "parallel": ("errors", "config", "data"),
    "model": ("errors", "config", "data", "parallel"),
    "checkpoints_convert": ("errors", "runtime", "config", "data", "parallel", "model"),
    "engine": (
        "errors",
        "runtime",
        "config",
        "objectives",
        "data",
        "parallel",
        "model",
        "checkpoints_convert",
    ),
    "reference": (
        "errors",
        "runtime",
        "config",
        "objectives",
        "data",
        "parallel",
        "model",
        "checkpoints_convert",
        "engine",
    ),
    "evaluation": (
        "errors",
        "runtime",
        "config",
        "objectives",
        "data",
        "generation",
        "parallel",
        "model",
        "checkpoints_convert",
        "engine",
    ),
    "training": (
        "errors",
        "runtime",
        "config",
        "objectives",
        "data",
        "parallel",
        "model",
        "checkpoints_convert",
        "engine",
        "evaluation",
    ),
    "cli": ("errors", "runtime", "config"),
}
"""Room -> the rooms that it may import, all of which stand above it.

A room is a folder or a file of megatron_longpo, or checkpoints_convert. cli.py names the function
of every command as text and imports it when that command runs.
"""

CALLS_CLI = ("checkpoints_convert.hf_to_megatron", "checkpoints_convert.megatron_to_hf")
"""Files that can also be started with `python -m`: there they call cli.main."""

LIGHT_ROOMS = ("errors", "config", "cli", "__main__")
"""Rooms that a wrong setting, or --help, must not wait for torch in."""

LIGHT_FILES = ("runtime.parent", "runtime.stop", "runtime.gpu_memory")

HEAVY = ("torch", "transformers", "numpy", "megatron", "datasets", "matplotlib")

ONLY_IN_PARALLEL = ("parallel_state", "mpu", "get_cuda_rng_tracker_group")
"""Names of Megatron's global process groups."""


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
EVERYTHING = modules_of(*OURS)


def offences(module: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return sorted(
        name
        for name in SOURCE[module]
        if any(is_within(name, package) for package in forbidden)
        and not any(is_within(name, package) for package in allowed)
    )


def room_of(module: str) -> str | None:
    """`megatron_longpo.data.rows.dataset -> data`; None for the package itself."""
    parts = module.split(".")
    if parts[0] == "checkpoints_convert":
        return parts[0]
    assert parts[0] == "megatron_longpo", module
    return parts[1] if len(parts) > 1 else None


def rooms_imported(module: str) -> dict[str, str]:
    """Room -> one of the modules of it that `module` imports."""
    found: dict[str, str] = {}
    for name in SOURCE[module]:
        known = next((known for known in prefixes(name) if known in SOURCE), None)
        room = None if known is None else room_of(known)
        if known is not None and room is not None and room != room_of(module):
            found.setdefault(room, known)
    return found


def prefixes(name: str) -> Iterator[str]:
    """`a.b.c -> a.b.c, a.b, a`."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def circle_in(graph: Mapping[str, set[str]]) -> list[str] | None:
    """Returns nodes that lead back to the first of them, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for other in sorted(graph.get(node, ())):
            circle = visit(other, [*path, node])
            if circle is not None:
                return circle
        done.add(node)
        return None

    for node in sorted(graph):
        circle = visit(node, [])
        if circle is not None:
            return circle
    return None


def test_imports_are_seen_wherever_they_stand() -> None:
    source = (
        "import a.b as c\nfrom . import d\nfrom ..e import f\n"
        "def g():\n    from h.i import j\n    importlib.import_module('k')\n"
        "if TYPE_CHECKING:\n    import m\n"
    )
    found = set(imports_of(source, "top.middle.leaf", is_package=False))
    assert {"a.b", "top.middle.d", "top.e.f", "h.i", "h.i.j", "k", "m"} <= found
    assert "top.middle.pack.d" in set(imports_of(source, "top.middle.pack", is_package=True))


def test_a_circle_is_seen() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) is None


def test_the_files_are_found() -> None:
    for module in ("cli", "config.train", "data.rows.dataset", "training.loop", "engine.report"):
        assert f"megatron_longpo.{module}" in SOURCE


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(module) for module in SOURCE} - {None, "__main__"}
    assert rooms == set(ROOMS)


def test_the_table_is_a_list_from_top_to_bottom() -> None:
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed) <= above, room
        above.add(room)


@pytest.mark.parametrize("room", list(ROOMS))
def test_rooms_import_only_what_they_may(room: str) -> None:
    for module in SOURCE:
        if room_of(module) != room:
            continue
        imported = rooms_imported(module)
        if module in CALLS_CLI:
            imported.pop("cli", None)
        found = {other: name for other, name in imported.items() if other not in ROOMS[room]}
        assert not found, module


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {name for name in names if name in EVERYTHING and name != module}
        for module, names in EVERYTHING.items()
    }
    for module in CALLS_CLI:
        graph[module].discard("megatron_longpo.cli")
    # `from package import module` names the package too, whose own file is a docstring or a list.
    for module, names in graph.items():
        names -= {name for name in names if module.startswith(name + ".")}
    assert circle_in(graph) is None


def test_folders_of_a_room_import_each_other_in_one_direction() -> None:
    graph: dict[str, set[str]] = {}
    for module, names in SOURCE.items():
        if not module.startswith("megatron_longpo.") or module.count(".") < 2:
            continue
        folder = ".".join(module.split(".")[:3]) if module.count(".") > 2 else module
        others = {
            ".".join(name.split(".")[:3]) if name.count(".") > 2 else name
            for name in names
            if name in SOURCE and name.split(".")[:2] == module.split(".")[:2]
        }
        graph.setdefault(folder, set()).update(other for other in others if other != folder)
    assert circle_in(graph) is None


@pytest.mark.parametrize("room", ["data", "objectives", "generation", "config"])
def test_these_rooms_know_neither_megatron_nor_processes(room: str) -> None:
    for module in SOURCE:
        if room_of(module) == room:
            assert not offences(module, ("megatron", "torch.distributed")), module


def test_only_parallel_knows_megatron_s_groups() -> None:
    for module in SOURCE:
        if room_of(module) != "parallel":
            found = [n for n in SOURCE[module] if set(ONLY_IN_PARALLEL) & set(n.split("."))]
            assert not found, module


def test_training_knows_evaluation_by_one_file() -> None:
    files = {
        name
        for module in SOURCE
        if room_of(module) == "training"
        for name in SOURCE[module]
        if name in SOURCE and room_of(name) == "evaluation" and name.count(".") > 1
    }
    assert files == {"megatron_longpo.evaluation.in_training"}


def test_settings_and_commands_import_nothing_heavy() -> None:
    light = {f"megatron_longpo.{name}" for name in LIGHT_FILES}
    checked = [m for m in SOURCE if room_of(m) in LIGHT_ROOMS or m in light]
    assert light < set(checked) and "megatron_longpo.config.train" in checked
    for module in checked:
        assert not offences(module, HEAVY), module


def test_production_code_mocks_nothing() -> None:
    for module in SOURCE:
        assert not offences(module, ("unittest",)), module


def test_the_packages_do_not_need_tests_tools_or_examples() -> None:
    for module in SOURCE:
        assert not offences(module, ("tests", "tools", "examples")), module


def test_tools_do_not_need_examples() -> None:
    for module, names in EVERYTHING.items():
        if is_within(module, "tools"):
            assert not [name for name in names if is_within(name, "examples")], module
