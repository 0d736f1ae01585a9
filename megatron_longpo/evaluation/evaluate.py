"""`longpo evaluate`: measures one model part by part, or compares several evaluations.

The model runs in the place that the policy has in training: the same packs, layouts and pipeline,
without optimizer or gradients. After every part the whole `evaluation.json` is written; the same
command resumes with the missing parts, under the same or any other layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.checkpoint_weights import load_checkpoint_weights, open_checkpoint
from checkpoints_convert.gpt_weights import load_hf_weights
from checkpoints_convert.hf_folder import local_hf_folder
from checkpoints_convert.torch_dist import TRACKER_NAME
from megatron_longpo.config.evaluate import EvaluateConfig, check_evaluate_world
from megatron_longpo.config.train import ModelConfig
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.engine import build, degrees, run_folder
from megatron_longpo.engine.build_config import BuildConfig
from megatron_longpo.engine.console import RunConsole
from megatron_longpo.errors import StopRequested, UserError
from megatron_longpo.evaluation.compare import run_compare
from megatron_longpo.evaluation.generation import answer_questions
from megatron_longpo.evaluation.harness.run import check_packages, harness_model, run_suites
from megatron_longpo.evaluation.in_training import ask_base
from megatron_longpo.evaluation.output import EvaluationFile, print_numbers
from megatron_longpo.evaluation.scorer import KeptBase, Scorer
from megatron_longpo.evaluation.suite import Suite
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.parallel import groups as process_groups
from megatron_longpo.parallel.collectives import from_main_rank, on_any_rank
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.stages import like_split
from megatron_longpo.runtime import stop


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedModel:
    """The evaluated model: its files and its architecture."""

    path: str
    """Of its weights: a Hugging Face folder, or an iteration of a checkpoint."""
    tokenizer_folder: str
    arch: Architecture
    load: build.WeightsWriter
    is_checkpoint: bool


def run_evaluate(config: EvaluateConfig) -> None:
    """Measures a model or compares evaluations; `config` is resolved.

    Raises:
        UserError: for bad input.
        StopRequested: after a signal asked to stop; finished parts are saved.
    """
    check_evaluate_world(config, int(os.environ.get("WORLD_SIZE", 1)))
    if config.compare:
        run_compare(config.models, Path(config.folder))
        return
    try:
        evaluate(config)
    finally:
        process_groups.shutdown()


def evaluate(config: EvaluateConfig) -> None:
    """Checks everything, cheapest first, and measures the parts that the output lacks."""
    run_folder.check_folder("output", Path(config.folder))
    model = find_model(config)
    if config.generate and model.is_checkpoint:
        raise UserError(
            f"generate (true): {model.path} is a Megatron checkpoint, and transformers writes the "
            "answers. Export it first (longpo convert export), or leave generate out"
        )
    if config.suites:
        check_packages(config)
        if config.harness.backend != "megatron" and model.is_checkpoint:
            raise UserError(
                f"suite ({', '.join(config.suites)}): {model.path} is a Megatron checkpoint, and "
                f"{config.harness.backend} runs it. Export it first (longpo convert export), or, "
                "for suites with options, set --harness.backend megatron"
            )
    if config.uses_megatron:
        _evaluate_in_megatron(config, model)
    else:
        stop.listen()
        console = RunConsole(is_main=True)
        file = EvaluationFile.open(config, model.path, is_main=True)
        _run_suites(config, model, lambda: harness_model(config, model.path), file, console)
        _finish(config, file, console)


def _evaluate_in_megatron(config: EvaluateConfig, model: EvaluatedModel) -> None:
    base_folder = None if config.base is None else local_hf_folder(config.base)
    base = None if base_folder is None else read_architecture(base_folder)
    if base is not None and base.vocab_size != model.arch.vocab_size:
        raise UserError(
            f"base ({config.base}): its vocabulary has {base.vocab_size} tokens, that of "
            f"{model.path} {model.arch.vocab_size}; next-token distributions are compared, so "
            "give a base with the same tokenizer"
        )
    built = [model.arch, *([] if base is None else [base])]
    degrees.check_split(config.parallel, built)
    split = degrees.stage_split(config.parallel, model.arch)
    groups = process_groups.initialize(
        degrees.parallel_sizes(config.parallel, built),
        timeout_minutes=config.parallel.timeout_minutes,
    )
    stop.listen()
    console = RunConsole(is_main=groups.is_main)
    tokenizer = load_tokenizer(model.tokenizer_folder)
    suite = Suite.of(config.evaluation, lambda: tokenizer, vocab_size=model.arch.vocab_size)
    if suite.summary:
        console.say(suite.summary)
    file = EvaluationFile.open(config, model.path, is_main=groups.is_main)
    pending = from_main_rank(lambda: [name for name, _ in suite.split() if not file.has(name)])
    in_megatron = bool(config.suites) and config.harness.backend == "megatron"
    if pending or in_megatron:
        build_config = evaluation_build_config(config)
        kept = None
        if base is not None and base_folder is not None and "retention" in pending:
            base_model = build.build_scorer(
                build_config, base, base_folder, groups, split=like_split(base.num_layers, split)
            )
            kept = ask_base(suite, base_model, groups)
        chunks = build.build_scorer(
            build_config,
            model.arch,
            model.path,
            groups,
            split=split,
            say=console.say,
            write_weights=model.load,
        )
        scorer = Scorer(model=chunks, groups=groups, budget_tokens=config.pack_tokens or 1)
        _measure(suite, set(pending), scorer, kept, file, console)
        if in_megatron:
            # All ranks run the cells that the main rank's file lacks.
            file.record["suites"] = from_main_rank(lambda: file.record.get("suites", {}))
            _run_suites(
                config, model, lambda: _megatron_model(config, model, scorer), file, console
            )
        chunks.clear()
    if config.generate and suite.retrieval is not None:
        _generate(config, suite, model, tokenizer, file, groups, console)
    if config.suites and not in_megatron:
        _run_suites(config, model, lambda: harness_model(config, model.path), file, console)
    _finish(config, file, console)


def evaluation_build_config(config: EvaluateConfig) -> BuildConfig:
    """Returns what the evaluated model and its base are built from; `config` is resolved."""
    (hf_path,) = config.models
    return BuildConfig(
        model=ModelConfig(
            hf_path=hf_path,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
            dtype=config.dtype,
            attention_kernel=config.attention_kernel,
            layers=config.layers,
        ),
        parallel=config.parallel,
    )


def _finish(config: EvaluateConfig, file: EvaluationFile, console: RunConsole) -> None:
    if file.is_main:
        file.save(complete=True)
        print_numbers(file.record, title=config.models[0])
    console.say(f"{file.path}")


def _run_suites(
    config: EvaluateConfig,
    model: EvaluatedModel,
    make_model: Callable[[], Any],
    file: EvaluationFile,
    console: RunConsole,
) -> None:
    from transformers import AutoTokenizer

    run_suites(
        config,
        model_path=model.tokenizer_folder,
        tokenizer=AutoTokenizer.from_pretrained(model.tokenizer_folder),
        make_model=make_model,
        file=file,
        say=console.say,
    )


def _megatron_model(config: EvaluateConfig, model: EvaluatedModel, scorer: Scorer) -> Any:
    from transformers import AutoTokenizer

    # Imports lm-eval, which is optional.
    from megatron_longpo.evaluation.harness.megatron_model import MegatronModel

    return MegatronModel(
        scorer,
        AutoTokenizer.from_pretrained(model.tokenizer_folder),
        max_length=config.harness.max_length or model.arch.max_position_embeddings,
        vocab_size=model.arch.vocab_size,
        name=model.path,
    )


def find_model(config: EvaluateConfig) -> EvaluatedModel:
    """Finds the model, a Hugging Face model or a checkpoint, and reads its architecture."""
    (source,) = config.models
    folder = Path(source).expanduser()
    rope = {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    if (folder / TRACKER_NAME).is_file() or (folder / ".metadata").is_file():
        checkpoint = open_checkpoint(
            str(folder), base=config.adapter_base, base_option="--adapter_base"
        )
        hf_folder = str(checkpoint.hf_folder)
        return EvaluatedModel(
            path=str(checkpoint.iteration),
            tokenizer_folder=hf_folder,
            arch=read_architecture(hf_folder, **rope),  # type: ignore[arg-type]
            load=lambda gpt, arch, _: load_checkpoint_weights(checkpoint, gpt, arch),
            is_checkpoint=True,
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"models ({source}): neither config.json of a Hugging Face model nor {TRACKER_NAME} of "
            "a Megatron checkpoint is there. Give one of these folders, or a hub id"
        )
    hf_folder = local_hf_folder(source)
    return EvaluatedModel(
        path=hf_folder,
        tokenizer_folder=hf_folder,
        arch=read_architecture(hf_folder, **rope),  # type: ignore[arg-type]
        load=load_hf_weights,
        is_checkpoint=False,
    )


def _measure(
    suite: Suite,
    pending: set[str],
    scorer: Scorer,
    base: KeptBase | None,
    file: EvaluationFile,
    console: RunConsole,
) -> None:
    def track(parts: Any) -> Any:
        return console.track(parts, what=name, total=len(parts))

    for name, part in suite.split():
        if name not in pending:
            continue
        _stop_if_asked(file, scorer.groups)
        file.add(part.measure(scorer, base=base, track=track))
        console.say(f"measured: {name}")


def _generate(
    config: EvaluateConfig,
    suite: Suite,
    model: EvaluatedModel,
    tokenizer: ChatTokenizer,
    file: EvaluationFile,
    groups: Groups,
    console: RunConsole,
) -> None:
    """Lets transformers answer the questions of cells without an answer."""
    assert suite.retrieval is not None
    parts = [part for part in suite.retrieval.split() if not file.has_generated(part)]
    if not parts:
        return
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    writer: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype)
    writer.to(groups.device).eval()
    for part in parts:
        _stop_if_asked(file, groups)
        what = f"answering {part.questions[0].kind} {part.questions[0].length}"
        questions = console.track(part.questions, what=what, total=len(part.questions))
        file.add_generated(
            part, answer_questions(writer, tokenizer, part, questions, config.new_tokens)
        )
        console.say(f"answered: {part.questions[0].kind} {part.questions[0].length}")


def _stop_if_asked(file: EvaluationFile, groups: Groups) -> None:
    if on_any_rank(stop.was_requested(), groups.device):
        raise StopRequested(f"stopped; {file.path} has what was measured; the same command goes on")
