"""Saves, loads and prunes checkpoints; a crash at any moment loses none of them.

A checkpoint is written under a temporary name, renamed when every rank is done, and only then
named in `latest_checkpointed_iteration.txt` (contract.md section 6). A save in the background does
the same.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from checkpoints_convert.hf_folder import write_hf_side_files
from checkpoints_convert.lora_record import LORA_NAME, LoraRecord, read_lora_record
from checkpoints_convert.torch_dist import (
    HF_FOLDER_NAME,
    TRACKER_NAME,
    TorchDistReader,
    find_iteration_folder,
    iteration_folder,
)
from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.data.trees.sampler import PairSampler
from megatron_longpo.engine.run_folder import package_versions
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.runtime import stop
from megatron_longpo.training.background import ASYNC_SAVE, BackgroundSaves
from megatron_longpo.training.megatron_optimizer import initialize_state

PROGRESS_NAME = "progress.json"
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The only format of Megatron's that loads under any other layout."""

SHAPE_FIELDS = (
    "family",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "tied_embeddings",
)
"""Fields of an architecture that a checkpoint's tensors depend on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Everything that a checkpoint saves and restores."""

    model: Sequence[Any]
    """This rank's chunks; `sharded_state_dict` gives the policy alone, or its adapters alone."""
    optimizer: MegatronOptimizer
    optimizer_kind: dict[str, Any]
    """`optimizer.name` and `optimizer.distributed`, which decide the kind of its state."""
    sampler: PairSampler
    groups: Groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """`progress.json`: the progress of training, readable without torch."""

    step: int
    sampler: dict[str, Any]
    optimizer: dict[str, Any]
    """`TrainingState.optimizer_kind`."""
    world: dict[str, Any]
    """Parallel sizes and world size of the run that saved."""
    versions: dict[str, str]


def save(
    folder: Path,
    step: int,
    state: TrainingState,
    *,
    hf_source: str,
    arch: Architecture,
    dtype: str,
    keep: int,
    lora: LoraRecord | None = None,
    background: BackgroundSaves | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Saves step `step` under `folder` and deletes all but the `keep` newest checkpoints.

    Args:
        folder: `checkpoint.dir`.
        step: optimizer steps done.
        state: what to save.
        hf_source: Hugging Face folder whose tokenizer and config go along.
        arch: the policy, with its changed RoPE, as the saved config has it.
        dtype: torch's name of the weights' type.
        keep: how many checkpoints stay.
        lora: what the policy's adapters are, if it has some.
        background: writes while training continues; its save before is published. None = the
            checkpoint is published on return.
        say: prints what is saved, and how long training stood still for it.
    """
    started = time.perf_counter()
    final = iteration_folder(folder, step)
    temporary = final.with_name(final.name + ".writing")
    groups = state.groups
    if groups.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    dist.barrier()
    progress = Progress(
        step=step,
        sampler=state.sampler.state_dict(),
        optimizer=state.optimizer_kind,
        world={**asdict(groups.sizes), "world_size": groups.world_size},
        versions=package_versions(),
    )

    def publish() -> None:
        if groups.is_main:
            write_whole(temporary / PROGRESS_NAME, json.dumps(asdict(progress), indent=2) + "\n")
            write_hf_side_files(hf_source, temporary / HF_FOLDER_NAME, arch, dtype=dtype)
            if lora is not None:
                write_whole(temporary / LORA_NAME, lora.text())
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            write_whole(folder / TRACKER_NAME, f"{step}\n")
            _prune(folder, keep, step)
        dist.barrier()
        say(f"saved {final} in {time.perf_counter() - started:.1f} s")

    sharded = _sharded_state(state, is_loading=False)
    if background is None:
        with stop.spare_children():
            dist_checkpointing.save(sharded, str(temporary))
        dist.barrier()
        publish()
        return
    with stop.spare_children():
        request = dist_checkpointing.save(sharded, str(temporary), **ASYNC_SAVE)
    background.start(request, publish)
    waited = time.perf_counter() - started
    say(f"saving {final} in the background, for which training stood still {waited:.1f} s")


def newest(folder: Path) -> Path | None:
    """Returns the checkpoint that `checkpoint.resume: auto` resumes, or None."""
    return find_iteration_folder(str(folder)) if (folder / TRACKER_NAME).is_file() else None


def check_matches(checkpoint: Path, arch: Architecture, lora: LoraRecord | None = None) -> None:
    """Raises a UserError for a checkpoint of another model or other adapters; loads no weights."""
    saved = read_architecture(str(checkpoint / HF_FOLDER_NAME))
    for field in SHAPE_FIELDS:
        ours, theirs = getattr(arch, field), getattr(saved, field)
        if ours != theirs:
            raise UserError(
                f"checkpoint.resume ({checkpoint}): its model has {field} {theirs}, model.hf_path "
                f"has {ours}; give the checkpoint's own model, or another checkpoint"
            )
    _check_adapters(checkpoint, read_lora_record(checkpoint), lora)


def _check_adapters(checkpoint: Path, saved: LoraRecord | None, ours: LoraRecord | None) -> None:
    where = f"checkpoint.resume ({checkpoint})"
    if saved is None and ours is None:
        return
    if saved is None:
        raise UserError(
            f"{where}: it has whole weights, and lora is set; export it, and train adapters on "
            "that folder as model.hf_path"
        )
    if ours is None:
        raise UserError(
            f"{where}: it has adapters alone, and lora is null; set lora as it was (rank "
            f"{saved.rank}, alpha {saved.alpha:g}, targets {', '.join(saved.targets)}), or export "
            "it, and train that folder as model.hf_path"
        )
    for key in ("rank", "alpha", "targets"):
        mine, theirs = getattr(ours, key), getattr(saved, key)
        if mine != theirs:
            shown = [", ".join(v) if isinstance(v, tuple) else f"{v:g}" for v in (mine, theirs)]
            raise UserError(
                f"lora.{key} ({shown[0]}): {checkpoint} was saved with {shown[1]}; restore it, or "
                "choose another checkpoint"
            )
    if ours.base_fingerprint != saved.base_fingerprint:
        raise UserError(
            f"model.hf_path ({ours.base}): its weights are not those that the adapters of "
            f"{checkpoint} were trained on ({saved.base}); restore it, or choose another checkpoint"
        )


def load(checkpoint: Path, state: TrainingState, *, load_optimizer: bool) -> int:
    """Restores a checkpoint into `state` and returns the step it was saved at.

    An imported checkpoint has only weights: training starts from them at step 0.
    """
    progress = _read_progress(checkpoint)
    has_optimizer = any(key.startswith("optimizer.") for key in TorchDistReader(checkpoint).keys)
    with_optimizer = load_optimizer and has_optimizer
    if progress is not None:
        # Before anything is read into the model.
        state.sampler.load_state_dict(progress.sampler)
        if with_optimizer:
            _check_optimizer(checkpoint, progress.optimizer, state.optimizer_kind)
    if with_optimizer:
        initialize_state(state.optimizer)
    with_rng = progress is not None and progress.world == {
        **asdict(state.groups.sizes),
        "world_size": state.groups.world_size,
    }
    wanted = _sharded_state(
        state, is_loading=True, with_optimizer=with_optimizer, with_rng=with_rng
    )
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    for index, chunk in enumerate(state.model):
        _unwrapped(chunk).load_saved(loaded[_model_key(index, state.model)])
    if with_optimizer:
        state.optimizer.load_state_dict(loaded["optimizer"])
    else:
        # The optimizer's fp32 copies were made from the weights before these were loaded.
        state.optimizer.reload_model_params()
    if with_rng:
        _set_rng_state(loaded["rng"])
    return 0 if progress is None else progress.step


def _check_optimizer(checkpoint: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    for key, value in ours.items():
        if saved[key] != value:
            raise UserError(
                f"optimizer.{key} ({value}): {checkpoint} was saved with {saved[key]}, whose state "
                "is another; restore it, or leave the state with checkpoint.load_optimizer=false"
            )


def _sharded_state(
    state: TrainingState, *, is_loading: bool, with_optimizer: bool = True, with_rng: bool = True
) -> dict[str, Any]:
    sharded: dict[str, Any] = {
        _model_key(index, state.model): _unwrapped(chunk).sharded_state_dict()
        for index, chunk in enumerate(state.model)
    }
    if with_optimizer:
        weights = dict(sharded) if len(state.model) > 1 else sharded["model"]
        sharded["optimizer"] = state.optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=OPTIMIZER_FORMAT
        )
    if with_rng:
        rank, world_size = state.groups.rank, state.groups.world_size
        sharded["rng"] = ShardedObject("rng", _rng_state(), (world_size,), (rank,))
    if not is_loading:
        sharded["checkpoint_version"] = 3.0
    return sharded


def _model_key(index: int, model: Sequence[Any]) -> str:
    """Returns Megatron-LM's key: `model`, or `model0`, `model1` with a virtual pipeline."""
    return "model" if len(model) == 1 else f"model{index}"


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _read_progress(checkpoint: Path) -> Progress | None:
    path = checkpoint / PROGRESS_NAME
    if not path.is_file():
        return None
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a training checkpoint's progress ({error})") from error


def _prune(folder: Path, keep: int, step: int) -> None:
    """Deletes all but the `keep` newest checkpoints, of which `step` is the newest.

    A checkpoint of a later step is older: a run left it behind that then resumed an earlier one.
    Half-written checkpoints of crashed runs are deleted too.
    """
    for leftover in folder.glob("iter_*.writing"):
        shutil.rmtree(leftover)
    steps = sorted(
        (
            int(path.name.removeprefix("iter_"))
            for path in folder.iterdir()
            if re.fullmatch(r"iter_\d{7,}", path.name)
        ),
        key=lambda other: (other <= step, other),
    )
    for old in steps[:-keep]:
        shutil.rmtree(iteration_folder(folder, old))
