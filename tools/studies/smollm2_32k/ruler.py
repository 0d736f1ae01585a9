"""RULER of the study's models: measured, kept as one small JSON file each, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.engine.run_folder import package_versions
from tools.studies.smollm2_32k.commands import longpo, options
from tools.studies.smollm2_32k.results import RECIPE, read_json
from tools.studies.smollm2_32k.stages import Study


def measure_ruler(study: Study, data: Path | None) -> None:
    """RULER for the base and the models that are kept, side by side; goes on task by task. `data`
    is harness.data.

    Raises:
        OutOfTime: where the time was over before the end.
        CommandFailed: such as without the extra `eval`.
    """
    models: dict[str, tuple[str, Path, str | None]] = {"base": ("base", study.model, None)}
    for run in study.runs:
        if run.is_exported and (model := study.exported(run)).exists():
            models[run.name] = (run.title, model, study.digest(run.iteration))
        elif run.is_exported:
            print(f"RULER: without {run.name}, whose model is not here", flush=True)
    missing = [
        name
        for name, (*_, pairs) in models.items()
        if not has_ruler(ruler_path(study.results, name), pairs=pairs)
    ]
    folders = {
        name: study.keep / "ruler" / "-of-".join(filter(None, [name, models[name][2]]))
        for name in missing
    }
    values = dict(study.scale.ruler) | ({} if data is None else {"harness.data": data.resolve()})
    config = ("--config", RECIPE / "ruler.yaml")
    commands = {
        f"ruler-{name}": longpo(
            *("evaluate", models[name][1], *config),
            *options({"output": folders[name], **values}),
        )
        for name in missing
    }
    if commands:
        study.commands.together(commands)
    for name, folder in folders.items():
        title, _, pairs = models[name]
        write_ruler(
            ruler_path(study.results, name),
            folder / "evaluation.json",
            title=title,
            device=study.device,
            pairs=pairs,
        )


def write_ruler(
    path: Path, evaluation_file: Path, *, title: str, device: str, pairs: str | None
) -> None:
    """What a model does on RULER: `longpo evaluate`'s numbers, by task and length. `pairs` as in
    `Result`."""
    evaluation = read_json(evaluation_file)
    contents = {
        "title": title,
        "numbers": evaluation["numbers"],
        "pairs": pairs,
        "device": device,
        "versions": package_versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(contents, separators=(",", ":")) + "\n")


def read_ruler(folder: Path, *, pairs: str | None) -> dict[str, Mapping[str, float]]:
    """Numbers of RULER by the model's title: of the base, and of a model of these pairs."""
    found = [read_json(path) for path in sorted(folder.glob("ruler-*.json"))]
    return {one["title"]: one["numbers"] for one in found if one["pairs"] in (None, pairs)}


def has_ruler(path: Path, *, pairs: str | None) -> bool:
    """Whether a model of these pairs was measured there."""
    return path.exists() and read_json(path)["pairs"] == pairs


def ruler_path(folder: Path, name: str) -> Path:
    return folder / f"ruler-{name}.json"
