"""`longpo evaluate --suite` as tests run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config.evaluate import EvaluateConfig, check_evaluate_world, resolve_evaluate
from megatron_longpo.config.parser import load_config
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation import evaluate


def config_of(*argv: str) -> EvaluateConfig:
    return resolve_evaluate(
        load_config(EvaluateConfig, argv, command="evaluate", positionals=("models",))
    )


def run_command(model: str, data: Path, output: Path, *argv: str) -> dict[str, Any]:
    given = [model, f"--output={output}", f"--harness.data={data}", "--dtype=fp32", *argv]
    evaluate.evaluate(config_of(*given))
    contents: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    assert contents["complete"]
    return contents


def cells_of(contents: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = contents["results"]["suites"][suite]["cells"]
    return cells


def message_of(*argv: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as raised:
        config = config_of(*argv)
        check_evaluate_world(config, world_size)
        evaluate.evaluate(config)
    message = str(raised.value)
    assert "\n" not in message
    return message
