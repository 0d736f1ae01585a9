"""Runs suites part by part with lm-evaluation-harness, and saves the result of each part."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_longpo.config.evaluate import EvaluateConfig
from megatron_longpo.config.suites import HarnessSuite, check_only, read_suite
from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.evaluation.harness.judged import run_judged
from megatron_longpo.evaluation.harness.tasks import Part, load_task, parts_of, shorten
from megatron_longpo.evaluation.output import EvaluationFile
from megatron_longpo.runtime import stop

Say = Callable[[str], None]
FOLDER_NAME = "harness"
"""Folder beside evaluation.json for the harness's own output."""

PACKAGES = {"lm_eval": "megatron_longpo[eval]", "vllm": "vllm"}


def check_packages(config: EvaluateConfig) -> None:
    """Raises UserError if a package is missing."""
    needed = ["lm_eval", *(["vllm"] if config.harness.backend == "vllm" else [])]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            key = "suite" if name == "lm_eval" else "harness.backend (vllm)"
            raise UserError(
                f"{key}: needs the package {name}, which is not installed; pip install "
                f"'{PACKAGES[name]}'"
            )


def plan(config: EvaluateConfig) -> list[tuple[HarnessSuite, list[Part]]]:
    """Returns the suites of the config and their parts; a judged suite has no parts.

    Raises:
        UserError: for unknown names.
    """
    suites = [read_suite(name, config.harness) for name in config.suites]
    planned = [(suite, [] if suite.judged else parts_of(suite)) for suite in suites]
    only = config.harness.tasks
    check_only(only, list(dict.fromkeys(part.task for _, parts in planned for part in parts)))
    if only is None:
        return planned
    return [(suite, [part for part in parts if part.task in only]) for suite, parts in planned]


def run_suites(
    config: EvaluateConfig,
    *,
    model_path: str,
    tokenizer: Any,
    make_model: Callable[[], Any],
    file: EvaluationFile,
    say: Say,
) -> None:
    """Runs the parts that are not in the file yet; `make_model` is called once, if one is missing.

    With several processes, all of them call this, with models that answer alike.

    Raises:
        UserError: if rows cannot be read, or the file is from other settings.
        StopRequested: after a stop signal; finished parts are saved.
    """
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # else it logs a line for every task and setting
    planned = plan(config)
    for suite, _ in planned:
        if suite.chat_template and tokenizer.chat_template is None:
            raise UserError(
                f"suite ({suite.name}): {model_path} has no chat template; give one with the "
                "model's tokenizer, or --harness.chat_template false"
            )
        file.begin_suite(suite.name, mean=suite.mean, settings=_settings(config, suite))
    model: Any = None
    for suite, parts in planned:
        pending = [part for part in parts if not file.has_cell(suite.name, part.task, part.length)]
        judged = suite.judged is not None and not file.has_suite(suite.name)
        if (pending or judged) and model is None:
            model = make_model()
        folder = file.path.parent / FOLDER_NAME / suite.name
        if judged:
            cells = run_judged(config, suite, model, model_path=model_path, folder=folder, say=say)
            file.add_cells(suite.name, cells)
        for part in pending:
            if stop.was_requested():
                raise StopRequested(
                    f"stopped; {file.path} has what was measured; the same command resumes"
                )
            cell = _run_part(config, suite, part, model, model_path, tokenizer, folder, file)
            file.add_cells(suite.name, [cell])
            say(f"measured: {suite.name} {part.file_name} {suite.metric} {cell['value']:.4g}")


def _run_part(
    config: EvaluateConfig,
    suite: HarnessSuite,
    part: Part,
    model: Any,
    model_path: str,
    tokenizer: Any,
    folder: Path,
    file: EvaluationFile,
) -> dict[str, Any]:
    """Runs a part and returns its cell."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate as harness_evaluate

    task = load_task(suite, part, config.harness, tokenizer=model_path)
    if suite.shortened is not None:
        shorten(
            task,
            suite.shortened,
            tokenizer=tokenizer,
            most=model.max_length,
            chat_template=suite.chat_template,
        )
    task.set_config(key="num_fewshot", value=suite.shots)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    # Not simple_evaluate, which collects versions of the machine for seconds at every part.
    found: Any = harness_evaluate(
        model,
        {"tasks": {part.task: task}},
        limit=None if part.length is not None else suite.samples,
        apply_chat_template=suite.chat_template,
        fewshot_as_multiturn=suite.chat_template,
    )
    numbers = found["results"][part.task]
    key = next(key for key in numbers if key.startswith(f"{suite.metric},"))
    stderr = numbers.get(key.replace(",", "_stderr,"))
    samples = found.pop("samples")[part.task]
    if file.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{part.file_name}.jsonl", "".join(map(_sample_line, samples)))
        text = json.dumps(found, indent=2, default=str, ensure_ascii=False)
        write_whole(folder / f"{part.file_name}.json", text + "\n")
    return {
        "task": part.task,
        "group": part.group,
        "length": part.length,
        "metric": suite.metric,
        "value": float(numbers[key]),
        "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
        "samples": int(found["n-samples"][part.task]["effective"]),
    }


def _sample_line(sample: dict[str, Any]) -> str:
    """Returns what a model wrote or preferred, without the prompt, which may be a whole book."""
    keys = ("doc_id", "target", "filtered_resps", *sample["metrics"])
    line = {key: sample[key] for key in keys}
    if isinstance(length := sample["doc"].get("length"), int):
        line["length"] = length
    return json.dumps(line, ensure_ascii=False, default=str) + "\n"


def _settings(config: EvaluateConfig, suite: HarnessSuite) -> dict[str, Any]:
    """Returns the settings that the numbers of a suite depend on."""
    harness = config.harness
    settings: dict[str, Any] = {
        "backend": harness.backend,
        "dtype": config.dtype,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "shots": suite.shots,
        "samples": suite.samples,
        "chat_template": suite.chat_template,
        "max_length": harness.max_length,
        "model_args": harness.model_args,
        "data": harness.data,
        "seed": harness.seed if suite.lengths else None,
    }
    if suite.judged is not None:
        settings["judge"] = [harness.judge.model, harness.judge_tokens]
    return settings


def harness_model(config: EvaluateConfig, model_path: str) -> Any:
    """Builds the harness's own model of the backend hf or vllm."""
    import torch
    from lm_eval.api.registry import get_model

    harness = config.harness
    args: dict[str, Any] = {
        "pretrained": model_path,
        "dtype": "bfloat16" if config.dtype == "bf16" else "float32",
    }
    longest = _longest(config, model_path)
    if harness.backend == "vllm":
        args |= {"max_model_len": longest, "batch_size": "auto"}
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        args |= {"max_length": longest, "batch_size": harness.batch_size, "device": device}
    return get_model(harness.backend)(**{**args, **(harness.model_args or {})})


def _longest(config: EvaluateConfig, model_path: str) -> int:
    """Returns the most tokens that the model gets. By default, the harness silently cuts off the
    beginning of prompts over the model's positions; RULER gives such prompts whole."""
    from transformers import AutoConfig

    positions = AutoConfig.from_pretrained(model_path).get_text_config().max_position_embeddings
    lengths = [
        length
        for name in config.suites
        for length in read_suite(name, config.harness).lengths or ()
    ]
    return max(config.harness.max_length or int(positions), *lengths, 0)
