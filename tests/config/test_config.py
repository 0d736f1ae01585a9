"""Settings: parsing, rules, and what a user reads who got one wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from megatron_longpo import objectives
from megatron_longpo.config.fields import Setting, flat_values, settings_of
from megatron_longpo.config.help import value_note
from megatron_longpo.config.megatron_flags import MEGATRON_FLAGS, SWIFT_FLAGS, suggestion
from megatron_longpo.config.names import LoraTarget, ObjectiveName
from megatron_longpo.config.objective_defaults import OBJECTIVE_DEFAULTS
from megatron_longpo.config.train import (
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
    check_world,
    load_train_config,
    resolve,
)
from megatron_longpo.errors import UserError
from megatron_longpo.model import lora

ROOT = Path(__file__).parents[2]
REQUIRED = ["--model.hf_path=m", "--data.path=d", "--logging.dir=runs/a"]

CONTRACT_DEFAULTS: dict[str, Any] = {
    "model.rope_theta": None,
    "model.rope_scaling": None,
    "model.max_position_embeddings": None,
    "model.dtype": "bf16",
    "model.attention_kernel": "auto",
    "model.layers": "auto",
    "reference.mode": "online",
    "reference.hf_path": "m",
    "reference.context": "short",
    "reference.cache_path": None,
    "reference.offload": False,
    "data.split": None,
    "data.eval_split": None,
    "data.eval_path": None,
    "data.max_length": 131072,
    "data.too_long": "error",
    "data.pack_tokens": None,
    "data.share_prefix": True,
    "data.shuffle": True,
    "data.seed": 42,
    "objective.name": "longpo",
    "objective.beta": 0.01,
    "objective.preference_weight": 0.01,
    "objective.nll_weight": 1.0,
    "objective.nll_scope": "chosen_row",
    "objective.answer_nll_weight": 0.0,
    "objective.turns": "summed",
    "objective.label_smoothing": 0.0,
    "objective.gamma": 0.0,
    "objective.alignment_weight": 0.0,
    "objective.divergence_weight": 0.0,
    "objective.divergence_scope": "chosen_answers",
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.virtual_pipeline": None,
    "parallel.pipeline_layout": None,
    "parallel.context": 1,
    "parallel.context_comm": "all_gather",
    "parallel.context_inner": None,
    "parallel.sequence": False,
    "parallel.timeout_minutes": 60,
    "optimizer.name": "rmsprop",
    "optimizer.lr": 5e-7,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 1.0,
    "optimizer.alpha": 0.99,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.eps": 1e-8,
    "optimizer.lr_schedule": "cosine",
    "optimizer.warmup_ratio": 0.1,
    "optimizer.min_lr": 0,
    "optimizer.distributed": True,
    "optimizer.grad_dtype": "fp32",
    "optimizer.state_dtype": "fp32",
    "optimizer.overlap_grad_reduce": False,
    "optimizer.overlap_param_gather": False,
    "train.global_batch_pairs": 8,
    "train.epochs": 1,
    "train.steps": None,
    "train.seed": 42,
    "train.recompute": "selective",
    "train.recompute_modules": None,
    "train.recompute_layers": None,
    "train.offload_activations": False,
    "train.eval_interval": 0,
    "train.eval_at_start": True,
    "train.dry_run": False,
    "checkpoint.dir": "runs/a/checkpoints",
    "checkpoint.interval": 500,
    "checkpoint.keep": 2,
    "checkpoint.async_save": False,
    "checkpoint.resume": "auto",
    "checkpoint.load_optimizer": True,
    "logging.interval": 1,
    "logging.tensorboard": True,
    "logging.wandb": None,
    "lora": None,
    "evaluation.retrieval": None,
    "evaluation.nll": None,
    "evaluation.retention": None,
}


def load(*options: str) -> TrainConfig:
    return load_train_config([*REQUIRED, *options])


def message_of(*options: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder: Path, text: str) -> str:
    path = folder / "train.yaml"
    path.write_text(text)
    return str(path)


# Defaults


def test_defaults_are_those_of_the_contract() -> None:
    values = dict(flat_values(load()))
    for key, value in CONTRACT_DEFAULTS.items():
        assert values.pop(key) == value, key
    assert values == {"model.hf_path": "m", "data.path": "d", "logging.dir": "runs/a"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("longpo", (0.01, 0.01, 1.0, "chosen_row", "short", "online")),
        ("dpo", (0.1, 1.0, 0.0, "chosen_answers", "long", "online")),
        ("sft", (0.0, 0.0, 1.0, "chosen_answers", "long", "none")),
        ("sft_rejected", (0.0, 0.0, 1.0, "chosen_answers", "long", "none")),
        ("ipo", (0.1, 1.0, 0.0, "chosen_answers", "long", "online")),
        ("simpo", (2.0, 1.0, 0.0, "chosen_answers", "long", "none")),
        ("orpo", (0.0, 0.1, 1.0, "chosen_answers", "long", "none")),
        ("sft_short_to_long", (0.0, 0.0, 1.0, "chosen_answers", "short", "online")),
        ("solopo_dpo", (0.1, 1.0, 0.0, "chosen_answers", "short", "online")),
        ("opsdl", (0.0, 0.0, 0.0, "chosen_answers", "short", "online")),
    ],
)
def test_the_objective_decides_what_is_left_out(name: str, expected: tuple[Any, ...]) -> None:
    config = load(f"--objective.name={name}")
    objective, reference = config.objective, config.reference
    assert expected == (
        objective.beta,
        objective.preference_weight,
        objective.nll_weight,
        objective.nll_scope,
        reference.context,
        reference.mode,
    )


def test_the_nll_of_answers_can_be_all_that_trains() -> None:
    none = ["--objective.preference_weight=0", "--objective.nll_weight=0"]
    assert load(*none, "--objective.answer_nll_weight=1").objective.answer_nll_weight == 1


def test_what_the_user_says_wins_over_the_objective() -> None:
    config = load(
        "--objective.name=dpo",
        "--objective.beta=0.3",
        "--objective.nll_weight=0.5",
        "--objective.nll_scope=chosen_row",
        "--reference.context=short",
        "--reference.hf_path=other",
        "--checkpoint.dir=elsewhere",
    )
    assert config.objective.beta == 0.3
    assert config.objective.nll_weight == 0.5
    assert config.objective.nll_scope == "chosen_row"
    assert config.reference.context == "short"
    assert config.reference.hf_path == "other"
    assert config.checkpoint.dir == "elsewhere"


def test_resolving_twice_changes_nothing() -> None:
    for name in OBJECTIVE_DEFAULTS:
        config = load(f"--objective.name={name}")
        assert resolve(config) == config


def test_objective_names_agree_with_the_objectives() -> None:
    names = get_args(ObjectiveName)
    assert get_args(get_type_hints(ObjectiveConfig)["name"]) == names
    assert tuple(OBJECTIVE_DEFAULTS) == tuple(objectives.OBJECTIVES) == names


@pytest.mark.parametrize("name", list(OBJECTIVE_DEFAULTS))
def test_every_objective_builds_from_its_resolved_settings(name: str) -> None:
    config = load(f"--objective.name={name}")
    settings = dataclasses.asdict(config.objective)
    assert None not in settings.values()
    built = objectives.build_objective(
        settings.pop("name"), {**settings, "reference_context": config.reference.context}
    )
    fields = dataclasses.asdict(built)
    assert fields.items() >= {k: v for k, v in settings.items() if k in fields}.items()
    # A reference is loaded where the objective reads one, and nowhere else.
    reads = bool(built.needs.reference) or built.needs.divergence is not None
    assert reads == (config.reference.mode == "online")


def test_a_cache_has_a_place_of_its_own_in_the_runs_folder() -> None:
    assert load("--reference.mode=cached").reference.cache_path == "runs/a/reference_logps"
    shared = load("--reference.mode=cached", "--reference.cache_path=shared")
    assert shared.reference.cache_path == "shared"
    assert resolve(shared) == shared


# YAML and command line


def test_options_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    first = write(tmp_path, "optimizer: {lr: 1e-6, min_lr: 1e-8}\ntrain: {steps: 3}\n")
    second = tmp_path / "second.yaml"
    second.write_text("train: {steps: 4}\n")
    config = load("--optimizer.lr=2e-6", f"--config={first}", f"--config={second}")
    assert config.optimizer.lr == 2e-6
    assert config.optimizer.min_lr == 1e-8
    assert config.train.steps == 4


def test_numbers_texts_and_switches_as_people_write_them(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "data: {max_length: 131_072}\noptimizer: {lr: 5e-7}\n",
    )
    config = load(
        f"--config={path}",
        "--train.dry_run",
        "--checkpoint.resume",
        "123",
        "--train.recompute",
        "none",
        "--reference.hf_path=null",
        "--data.share-prefix=false",
    )
    assert config.data.max_length == 131072
    assert config.optimizer.lr == 5e-7
    assert config.train.dry_run is True
    assert config.checkpoint.resume == "123"
    assert config.train.recompute == "none"
    assert config.reference.hf_path == "m"
    assert config.data.share_prefix is False


def test_objects_come_whole_or_item_by_item() -> None:
    whole = load('--model.rope_scaling={"rope_type": "linear", "factor": 8.0}')
    items = load("--model.rope_scaling.rope_type=linear", "--model.rope_scaling.factor=8.0")
    assert whole.model.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert items.model.rope_scaling == whole.model.rope_scaling


def test_wandb_is_a_section_that_may_be_null() -> None:
    wandb = load("--logging.wandb.project=p", "--logging.wandb.mode=offline").logging.wandb
    assert wandb is not None
    assert (wandb.project, wandb.name, wandb.mode) == ("p", None, "offline")
    assert "logging.wandb.project is missing" in message_of("--logging.wandb.name=x")


def test_a_file_of_comments_sets_nothing(tmp_path: Path) -> None:
    assert load(f"--config={write(tmp_path, '# nothing yet')}") == load()


def test_merge_keys_and_anchors_work(tmp_path: Path) -> None:
    path = write(tmp_path, "data: &rows\n  seed: 7\n  path: p\ntrain:\n  <<: {steps: 5}\n")
    config = load(f"--config={path}")
    assert (config.data.seed, config.train.steps) == (7, 5)


# What is wrong, where, and what to do


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  steps: 1e3\n", "train.yaml:2: train.steps (1e3) must be an integer or null"),
        ("train:\n\n  dry_run: 2\n", "train.yaml:3: train.dry_run (2) must be true or false"),
        (
            "model:\n  hf_path: 2\n",
            "train.yaml:2: model.hf_path (2) must be text. Put it in quotes",
        ),
        ("data:\n  path: null\n", "train.yaml:2: data.path (null) must be text"),
        ("optimizer:\n  lr: fast\n", "train.yaml:2: optimizer.lr (fast) must be a number"),
        ("optimizer:\n  lr: -1\n", "train.yaml:2: optimizer.lr (-1) must be at least 0"),
        ("optimizer:\n  lr: .nan\n", "train.yaml:2: optimizer.lr (nan) must be at least 0"),
        ("optimizer: 3\n", "train.yaml:1: optimizer (3) must be an object (key: value)"),
        ("train:\ndata: {path: d}\n", "train.yaml:1: train is an empty section"),
        ("lora: [1]\n", "train.yaml:1: lora (a list) must be an object (key: value) or null"),
        ("model: {rope_scaling: 8}\n", "(8) must be an object (key: value) or null"),
        ("objective:\n  name: kto\n", "must be one of longpo, dpo, ipo, simpo, orpo, sft,"),
        ("train: {seed: 1}\ntrain: {seed: 2}\n", "train.yaml:2: train stands twice, first at"),
        ("train:\n  seed: [1\n", "train.yaml:3: not valid YAML: expected"),
        ("- train\n", "train.yaml:1: must be `section:` and keys under it"),
        ("optimiser:\n  lr: 1\n", "train.yaml:1: optimiser is not a setting. The nearest is"),
        ("train:\n  stepz: 1\n", "train.yaml:2: train.stepz is not a setting. The nearest is "),
        (
            "parallel:\n  tensor_model_parallel_size: 2\n",
            "Megatron-LM's tensor_model_parallel_size is parallel.tensor here",
        ),
        ("optimizer:\n  learning_rate: 2\n", "ms-swift's learning_rate is optimizer.lr here"),
        (
            "data:\n  beta: 2\n",
            "train.yaml:2: data.beta is not a setting. Did you mean objective.beta?",
        ),
    ],
)
def test_a_mistake_in_the_file_names_line_key_value_and_remedy(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert expected in message_of(f"--config={write(tmp_path, text)}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--optimizer.lr=abc"], "--optimizer.lr (abc) must be a number"),
        (["--optimizer.lr=nan"], "--optimizer.lr (nan) must be a number"),
        (["--objective.label_smoothing=0.5"], "(0.5) must be at least 0 and below 0.5"),
        (["--objective.beta=-0.1"], "--objective.beta (-0.1) must be at least 0"),
        (["--optimizer.warmup_ratio=1.5"], "(1.5) must be at least 0 and at most 1"),
        (["--checkpoint.keep=0"], "--checkpoint.keep (0) must be at least 1. The default is 2"),
        (["--data.max_length=0"], "--data.max_length (0) must be at least 2"),
        (["--train.global_batch_pairs=0"], "(0) must be at least 1. The default is 8"),
        (["--parallel.context_comm=p2p"], "one of a2a, all_gather, a2a+all_gather"),
        (["--context-parallel-size", "4"], "context_parallel_size is parallel.context here"),
        (["--micro_batch_size", "4"], "Megatron-LM's micro_batch_size is data.pack_tokens here"),
        (["--lr-warmup-fraction", "0.1"], "lr_warmup_fraction is optimizer.warmup_ratio here"),
        (["--lr", "1"], "--lr: no such option. Did you mean optimizer.lr?"),
        (["--seed", "1"], "Did you mean data.seed or train.seed or evaluation."),
        (["--optimizer.lrr", "1"], "The nearest is optimizer.lr"),
        (["--zzzzzzzz", "1"], "--zzzzzzzz: no such option. See --help"),
        (["-x"], "-x: no such option"),
        (["--optimizer", "x"], "--optimizer is a section. Set its keys, such as --optimizer.name"),
        (["--train.steps"], "--train.steps needs a value: an integer or null"),
        (["--config"], "--config needs a value: a file"),
        (["--config=absent.yaml"], "--config (absent.yaml): No such file"),
        (["stray"], "stray: one argument too many"),
    ],
)
def test_a_mistake_on_the_command_line(options: list[str], expected: str) -> None:
    assert expected in message_of(*options)


def test_what_is_required_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"^data\.path is missing \(.*Give --data\.path VALUE"):
        load_train_config(["--model.hf_path=m", "--logging.dir=l"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--parallel.virtual_pipeline=2"], "parallel.pipeline is 1. Use null"),
        (["--parallel.pipeline_layout=Ett|m|L"], "m is none of E (embedding)"),
        (["--parallel.pipeline_layout=tt|EL"], "it must begin with the only E"),
        (["--parallel.pipeline_layout=Et||L"], "stage 2 has nothing to do"),
        (
            ["--parallel.pipeline=2", "--parallel.pipeline_layout=Et|t|L"],
            "its 3 stages must be a multiple of parallel.pipeline (2)",
        ),
        (
            [
                "--parallel.pipeline=2",
                "--parallel.virtual_pipeline=2",
                "--parallel.pipeline_layout=Et|L",
            ],
            "its 2 stages must equal parallel.pipeline (2) x parallel.virtual_pipeline (2)",
        ),
        (["--parallel.context_inner=2"], "is all_gather. Remove it, or use a2a+all_gather"),
        (
            [
                "--parallel.context=6",
                "--parallel.context_comm=a2a+all_gather",
                "--parallel.context_inner=4",
            ],
            "parallel.context_inner (4) must divide parallel.context (6). Use one of 1, 2, 3, 6",
        ),
        (
            ["--optimizer.overlap_param_gather"],
            "optimizer.overlap_param_gather (true) needs optimizer.overlap_grad_reduce",
        ),
        (
            [
                "--optimizer.overlap_param_gather",
                "--optimizer.overlap_grad_reduce",
                "--optimizer.distributed=false",
            ],
            "optimizer.overlap_param_gather (true) needs optimizer.distributed",
        ),
        (["--train.recompute_modules=[moe]"], "each item one of core_attn, layernorm, mlp"),
        (
            ["--train.recompute=full", "--train.recompute_modules=[mlp]"],
            "train.recompute_modules (mlp) is for train.recompute selective, which is full",
        ),
        (["--train.recompute_modules=[]"], "leaves nothing to recompute"),
        (["--train.recompute_layers=0"], "train.recompute_layers (0) must be at least 1"),
        (
            ["--train.recompute=none", "--train.recompute_layers=2"],
            "train.recompute_layers (2) says in how many layers something is recomputed",
        ),
        (
            ["--optimizer.state_dtype=bf16", "--optimizer.alpha=0.999"],
            "optimizer.alpha (0.999) is too slow a decay for optimizer.state_dtype bf16",
        ),
        (
            ["--optimizer.name=adam", "--optimizer.state_dtype=bf16", "--optimizer.beta2=0.999"],
            "optimizer.beta2 (0.999) is too slow a decay",
        ),
        (
            ["--train.offload_activations"],
            "train.offload_activations (true) is not for train.recompute selective",
        ),
        (["--lora.targets=[]"], "lora.targets ([]): nothing is left to train"),
        (["--lora.targets=[linear_fc1,linear_fc1]"], "lora.targets (linear_fc1, linear_fc1): a"),
        (["--lora.targets=[q_proj]"], "must be a list, each item one of linear_qkv, linear_proj"),
        (["--parallel.sequence"], "parallel.tensor is 1. Use false"),
        (["--objective.beta=0"], "objective.beta (0) must be above 0 for longpo"),
        (
            ["--objective.preference_weight=0", "--objective.nll_weight=0"],
            "nothing is left to train",
        ),
        (
            ["--objective.name=sft", "--objective.preference_weight=1"],
            "objective.preference_weight (1): sft has no use for it. Remove it, or use "
            "objective.name longpo, dpo, ipo, simpo, orpo, solopo_dpo",
        ),
        (["--objective.name=sft", "--objective.nll_weight=0"], "(0): nothing is left to train"),
        (["--objective.name=opsdl", "--objective.divergence_weight=0"], "nothing is left to train"),
        (["--objective.gamma=1"], "longpo has no use for it. Remove it, or use objective.name sim"),
        (["--objective.name=dpo", "--objective.alignment_weight=1"], "use objective.name solopo_"),
        (["--objective.name=ipo", "--objective.label_smoothing=0.1"], "ipo has no use for it"),
        (["--objective.name=opsdl", "--objective.turns=per_turn"], "opsdl has no use for it"),
        (
            ["--objective.name=sft", "--objective.answer_nll_weight=0.1"],
            "objective.answer_nll_weight (0.1): sft has no use for it. Remove it",
        ),
        (["--objective.name=simpo", "--reference.mode=online"], "simpo uses no reference"),
        (
            ["--objective.name=opsdl", "--reference.mode=none"],
            "reference.mode (none): opsdl compares whole next-token distributions",
        ),
        (["--objective.name=sft", "--reference.mode=online"], "sft uses no reference"),
        (
            ["--objective.name=sft_rejected", "--objective.nll_scope=chosen_row"],
            "objective.nll_scope (chosen_row): sft_rejected has no use for it",
        ),
        (
            ["--optimizer.grad_dtype=bf16", "--model.dtype=fp32"],
            "optimizer.grad_dtype (bf16): gradients have model.dtype at least",
        ),
        (["--optimizer.min_lr=1"], "optimizer.min_lr (1) must not exceed optimizer.lr (5e-07)"),
        (["--train.eval_interval=5"], "needs something to evaluate. Set data.eval_path"),
        (
            ["--reference.cache_path=x"],
            "reference.cache_path (x) is read where reference.mode is cached, and it is online",
        ),
        (
            ["--reference.mode=cached", "--reference.offload"],
            "reference.offload (true) is for a reference that runs beside the policy, and "
            "reference.mode is cached",
        ),
        (
            ["--objective.name=opsdl", "--reference.mode=cached"],
            "reference.mode (cached): opsdl compares whole next-token distributions",
        ),
        (["--objective.name=sft", "--reference.mode=cached"], "sft uses no reference"),
    ],
)
def test_settings_that_contradict_or_are_not_there_yet(options: list[str], expected: str) -> None:
    assert expected in message_of(*options)


def test_a_shared_file_with_a_beta_serves_sft_too() -> None:
    assert load("--objective.name=sft", "--objective.beta=0.1").objective.beta == 0.0


def test_resolve_checks_ranges_of_configs_made_in_python() -> None:
    config = dataclasses.replace(load(), model=ModelConfig(hf_path="m", rope_theta=0.0))
    with pytest.raises(UserError, match=r"model\.rope_theta \(0\) must be above 0"):
        resolve(config)
    with pytest.raises(UserError, match=r"^lora\.targets "):
        resolve(dataclasses.replace(load(), lora=LoraConfig(targets=())))


def test_lora_is_on_where_any_of_it_is_set(tmp_path: Path) -> None:
    assert load("--lora.rank=4").lora == LoraConfig(rank=4)
    file = write(tmp_path, "lora: {alpha: 8, targets: [linear_fc2, linear_qkv]}\n")
    expected = LoraConfig(alpha=8.0, targets=("linear_fc2", "linear_qkv"))
    assert load(f"--config={file}").lora == expected


def test_the_layers_for_adapters_are_the_models() -> None:
    assert LoraConfig().targets == get_args(LoraTarget) == tuple(lora.TARGETS)


# World size


def with_sizes(tensor: int = 1, pipeline: int = 1, context: int = 1) -> TrainConfig:
    config = load()
    parallel = dataclasses.replace(
        config.parallel, tensor=tensor, pipeline=pipeline, context=context
    )
    return dataclasses.replace(config, parallel=parallel)


def test_a_layout_says_how_many_chunks_a_stage_has() -> None:
    sizes = ("--parallel.pipeline=2", "--parallel.pipeline_layout=Et*2|(t|)*2L")
    assert load(*sizes).parallel.virtual_pipeline == 2
    assert load(*sizes, "--parallel.virtual_pipeline=2").parallel.virtual_pipeline == 2
    assert load("--parallel.pipeline=4", sizes[1]).parallel.virtual_pipeline is None
    one_chunk = load("--parallel.pipeline=2", "--parallel.virtual_pipeline=1")
    assert one_chunk.parallel.virtual_pipeline is None


@pytest.mark.parametrize(
    ("sizes", "world_size", "data_parallel"),
    [((1, 1, 1), 1, 1), ((1, 1, 1), 8, 8), ((2, 1, 1), 8, 4), ((2, 2, 4), 32, 2)],
)
def test_data_parallel_size(
    sizes: tuple[int, int, int], world_size: int, data_parallel: int
) -> None:
    assert check_world(with_sizes(*sizes), world_size) == data_parallel


def test_a_world_that_does_not_divide_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError) as caught:
        check_world(with_sizes(2, 1, 3), 8)
    message = str(caught.value)
    assert "parallel.tensor (2) x parallel.pipeline (1) x parallel.context (3) = 6" in message
    assert "must divide the number of processes (8)" in message
    assert "start 6 processes" in message


def test_more_ranks_than_pairs_are_refused() -> None:
    assert check_world(load("--train.global_batch_pairs=2"), 2) == 2
    with pytest.raises(UserError, match=r"global_batch_pairs \(2\) must be at least"):
        check_world(load("--train.global_batch_pairs=2"), 3)


# Documentation and import cost


def test_every_setting_is_documented_as_in_the_help() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    documented = re.findall(r"^\| `[a-z_0-9]+\..*", page[page.index("## `model`") :], re.MULTILINE)
    assert documented == [
        settings_row(setting)
        for setting in settings_of(TrainConfig).values()
        if not setting.is_section
    ]
    for key, setting in settings_of(TrainConfig).items():
        if setting.is_section:
            assert f"## `{key}`\n\n{with_links(setting.meaning)}\n" in page, key


def with_links(meaning: str) -> str:
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", meaning)


def settings_row(setting: Setting) -> str:
    """The line of docs/settings.md for a setting."""
    values, _, default = value_note(setting).partition("; ")
    default = default.removeprefix("default ")
    shown = default if setting.required else f"`{default}`"
    meaning = with_links(setting.meaning.replace("|", "\\|"))
    return f"| `{setting.key}` | {values} | {shown} | {meaning} |"


def test_the_page_has_the_defaults_by_objective() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()

    def shown(value: float) -> str:
        return f"{value:g}" if value else "-"

    for name, defaults in OBJECTIVE_DEFAULTS.items():
        cells = re.search(rf"^\| `{name}` \| (.*) \|$", page, re.MULTILINE)
        assert cells is not None, name
        beta, preference, nll, scope, context, mode, also = cells.group(1).split(" | ")
        assert (beta, preference) == (shown(defaults.beta), shown(defaults.preference_weight))
        assert float(nll) == defaults.nll_weight
        assert scope == ("-" if "nll_scope" in defaults.unused else defaults.nll_scope)
        assert mode == defaults.mode
        expected_context = "-" if mode == "none" else defaults.context
        assert context == ("both" if name == "solopo_dpo" else expected_context)
        for key in ("gamma", "alignment_weight", "divergence_weight"):
            value = getattr(defaults, key)
            assert (f"{key} {value:g}" in also) == bool(value), (name, key)


def test_every_setting_has_a_meaning() -> None:
    for key, setting in settings_of(TrainConfig).items():
        assert setting.meaning.endswith("."), key


def test_the_page_of_flags_agrees_with_the_code() -> None:
    page = (ROOT / "docs" / "megatron_flags.md").read_text()
    row = re.compile(r"^\| `--([a-z0-9_-]+)` \| `([a-z_.0-9]+)` \|", re.MULTILINE)
    documented = {flag.replace("-", "_"): key for flag, key in row.findall(page)}
    assert documented == {**MEGATRON_FLAGS, **SWIFT_FLAGS}


def test_flags_lead_to_keys_that_exist() -> None:
    keys = settings_of(TrainConfig)
    for flag, key in {**MEGATRON_FLAGS, **SWIFT_FLAGS}.items():
        assert key in keys, flag
        answer = suggestion(flag, [k for k in keys if k.count(".")] + ["lora", "logging.wandb"])
        assert key in answer, flag


def test_validation_needs_no_torch_and_little_time(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {hf_path: m}\ndata: {path: d}\nlogging: {dir: l}\n")
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from megatron_longpo.cli import main\n"
        "from megatron_longpo.config.train import load_train_config\n"
        f"load_train_config(['--config', {path!r}])\n"
        f"assert main(['train', '--config', {path!r}, '--parallel.tensr', '2']) == 2\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'numpy', 'megatron', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert seconds < 2, seconds\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load("--objective.name=sft", "--logging.wandb.project=p", "--optimizer.lr=3e-8")
    path = write(tmp_path, yaml.safe_dump(dataclasses.asdict(config)))
    assert load_train_config([f"--config={path}"]) == config


def test_a_runs_own_config_yaml_starts_another(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    recorded = "versions:\n  torch: 2.13.0\nfingerprints:\n  data: 1234\n"
    file.write_text("model: {hf_path: m}\ndata: {path: d}\nlogging: {dir: l}\n" + recorded)
    assert load_train_config(["--config", str(file)]).model.hf_path == "m"


CONFIG_OF_0_1 = """\
model:
  hf_path: models/Mistral-7B
  rope_theta: 10000000.0
  rope_scaling: null
  max_position_embeddings: null
  dtype: bf16
  attention_kernel: auto
  layers: auto
reference:
  mode: online
  hf_path: models/Mistral-7B
  context: short
  cache_path: null
  offload: false
data:
  path: rows.jsonl
  eval_path: null
  max_length: 131072
  too_long: error
  pack_tokens: null
  share_prefix: true
  shuffle: true
  seed: 42
objective:
  name: longpo
  beta: 0.01
  preference_weight: 0.01
  nll_weight: 1.0
  nll_scope: chosen_row
  answer_nll_weight: 0.0
  turns: summed
  label_smoothing: 0.0
  gamma: 0.0
  alignment_weight: 0.0
  divergence_weight: 0.0
  divergence_scope: chosen_answers
parallel:
  tensor: 4
  pipeline: 2
  virtual_pipeline: 2
  pipeline_layout: Et*7|t*8|t*8|t*9L
  context: 1
  context_comm: all_gather
  context_inner: null
  sequence: true
  timeout_minutes: 60.0
optimizer:
  name: rmsprop
  lr: 5.0e-07
  weight_decay: 0.0
  clip_grad: 1.0
  alpha: 0.99
  beta1: 0.9
  beta2: 0.95
  eps: 1.0e-08
  lr_schedule: cosine
  warmup_ratio: 0.1
  min_lr: 0.0
  distributed: true
  grad_dtype: fp32
  state_dtype: fp32
  overlap_grad_reduce: false
  overlap_param_gather: false
train:
  global_batch_pairs: 8
  epochs: 1
  steps: null
  seed: 42
  recompute: selective
  recompute_modules:
  - layernorm
  - mlp
  recompute_layers: null
  offload_activations: false
  eval_interval: 50
  eval_at_start: true
  dry_run: false
checkpoint:
  dir: runs/a/checkpoints
  interval: 500
  keep: 2
  async_save: false
  resume: auto
  load_optimizer: true
logging:
  dir: runs/a
  interval: 1
  tensorboard: true
  wandb:
    project: longpo
    name: null
    mode: offline
lora:
  rank: 16
  alpha: 32.0
  targets:
  - linear_qkv
  - linear_proj
evaluation:
  retrieval:
    kinds:
    - passkey
    lengths:
    - 4096
    - 32768
    depths:
    - 0.0
    - 0.5
    - 1.0
    samples: 4
    haystack: null
    seed: 0
  nll: null
  retention:
    prompts: null
    max_length: 2048
versions:
  megatron_longpo: 0.1.0
  python: 3.11.7
  torch: 2.13.0
  transformers: missing
fingerprints:
  data: 5b0d1c2e9f30
  policy: 9a7c66e01b42
"""
"""What a run of version 0.1.0 wrote as its config.yaml."""


def test_the_config_yaml_of_0_1_still_starts_a_run(tmp_path: Path) -> None:
    config = load_train_config(["--config", write(tmp_path, CONFIG_OF_0_1)])
    written = yaml.safe_load(CONFIG_OF_0_1)
    assert written.pop("versions") and written.pop("fingerprints")
    read = json.loads(json.dumps(dataclasses.asdict(config)))
    assert [read["data"].pop(key) for key in ("split", "eval_split")] == [None, None]  # since then
    assert read == written


def test_a_split_to_evaluate_on_needs_a_path() -> None:
    with pytest.raises(UserError, match=r"data.eval_split \(test\) needs data.eval_path"):
        load("--data.eval_split=test")
    assert load("--data.eval_split=test", "--data.eval_path=x").data.eval_split == "test"


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("optimizer:\n  min_lr: 1\n", [], "train.yaml:2: optimizer.min_lr (1) must not exceed"),
        ("", ["--optimizer.min_lr=1"], "--optimizer.min_lr (1) must not exceed optimizer.lr"),
        (
            "optimizer:\n  min_lr: 1\n",
            ["--optimizer.min_lr=2"],
            "--optimizer.min_lr (2) must not exceed",
        ),
        (
            "parallel:\n  pipeline_layout: Et|m|L\n",
            [],
            "train.yaml:2: parallel.pipeline_layout (Et|m|L): m is none of",
        ),
        ("lora:\n  targets: []\n", [], "train.yaml:2: lora.targets ([]): nothing is left"),
        (
            "evaluation:\n  retrieval:\n    depths: [0, 2]\n",
            [],
            "train.yaml:3: evaluation.retrieval.depths (2) must be at least 0 and at most 1",
        ),
        (
            "evaluation:\n  retrieval:\n    lengths: [0]\n",
            [],
            "train.yaml:3: evaluation.retrieval.lengths (0) must be at least 1",
        ),
        (
            "evaluation: {nll: {documents: d, length: 8,\n  bucket: 9}}\n",
            [],
            "train.yaml:2: evaluation.nll.bucket (9) must not exceed",
        ),
    ],
)
def test_settings_that_contradict_are_named_with_their_line(
    tmp_path: Path, text: str, options: list[str], expected: str
) -> None:
    message = message_of(f"--config={write(tmp_path, text)}", *options)
    assert message.removeprefix(f"{tmp_path}/").startswith(expected)
