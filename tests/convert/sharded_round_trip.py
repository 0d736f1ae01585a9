"""Two ranks load a model split over them, from safetensors and from an import, and save it; rank 0
exports what they saved and compares.

Started by test_sharded.py under torchrun, once for all cases, after `prepare`:

    torchrun --nproc-per-node 2 tests/convert/sharded_round_trip.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors.torch import load_file

from checkpoints_convert.gpt_weights import load_hf_weights
from checkpoints_convert.hf_folder import write_hf_side_files
from checkpoints_convert.hf_to_megatron import NoAttention, run_import
from checkpoints_convert.megatron_to_hf import run_export
from checkpoints_convert.torch_dist import HF_FOLDER_NAME, iteration_folder
from megatron_longpo.config.convert import ExportConfig, ImportConfig
from megatron_longpo.model.architectures import Architecture, read_architecture
from megatron_longpo.model.spec import build_gpt, transformer_config
from megatron_longpo.parallel import groups
from tools.tiny_models import make_tiny_model

CASES: list[dict[str, Any]] = [
    {"family": "qwen2", "tied": True, "sizes": {"tensor": 2, "sequence": True}},
    # Fewer key/value heads than ranks: a rank's rows end inside a group of heads.
    {"family": "qwen3", "tied": False, "kv_heads": 1, "sizes": {"tensor": 2}},
    # The last stage holds its own copy of the tied embedding.
    {"family": "llama", "tied": True, "sizes": {"pipeline": 2}},
    {"family": "mistral", "tied": False, "sizes": {"pipeline": 2, "virtual_pipeline": 2}},
]


def prepare(folder: Path) -> None:
    """Makes each case's model and its import, in one process."""
    for number, case in enumerate(CASES):
        changes = {key: value for key, value in case.items() if key != "sizes"}
        place = folder / str(number)
        make_tiny_model(folder=place / "hf", layers=4, tokenizer=False, **changes)
        run_import(ImportConfig(source=str(place / "hf"), destination=str(place / "import")))


def run_case(folder: Path, case: dict[str, Any]) -> None:
    start_distributed(folder)
    state = groups.initialize(groups.ParallelSizes(**case["sizes"]))
    iteration = iteration_folder(folder / "megatron", 7)
    hf = str(folder / "hf")
    if state.is_main:
        iteration.mkdir(parents=True)
    dist.barrier()
    arch = read_architecture(hf)
    chunks = build_chunks(arch, state, case["sizes"])
    for model in chunks:
        load_hf_weights(model, arch, hf)
        check_tied_copy(model, arch, hf)
    check_import(chunks, build_chunks(arch, state, case["sizes"]), folder / "import")
    dist_checkpointing.save(sharded(chunks), str(iteration))
    dist.barrier()
    if state.is_main:
        write_hf_side_files(hf, iteration / HF_FOLDER_NAME, arch)
        run_export(ExportConfig(source=str(iteration), destination=str(folder / "out")))
        expected = load_file(folder / "hf" / "model.safetensors")
        actual = load_file(folder / "out" / "model.safetensors")
        assert set(actual) == set(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected), case
        print(f"same: {case['family']} {case['sizes']}", flush=True)
    dist.barrier()
    groups.shutdown()


def start_distributed(folder: Path) -> None:
    """A store of its own for each case: torchrun's still holds the addresses of the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    world_size = int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=int(os.environ["RANK"]), world_size=world_size
    )


def build_chunks(arch: Architecture, state: groups.Groups, sizes: dict[str, Any]) -> list[GPTModel]:
    """This rank's model chunks, their weights not written yet."""
    config = transformer_config(arch, dtype="fp32", **sizes)
    stages = sizes.get("virtual_pipeline")
    last = (stages or 1) - 1
    return [
        build_gpt(
            arch,
            config,
            core_attention=NoAttention,
            pre_process=state.is_first_stage(stage),
            post_process=state.is_last_stage(stage),
            vp_stage=stage if stages else None,
        )
        for stage in range(last + 1)
    ]


def sharded(chunks: list[GPTModel]) -> dict[str, Any]:
    return {f"model{index}": model.sharded_state_dict() for index, model in enumerate(chunks)}


def check_tied_copy(model: GPTModel, arch: Architecture, hf: str) -> None:
    if model.post_process and not model.pre_process and arch.tied_embeddings:
        stored = load_file(Path(hf) / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(model.output_layer.weight[: arch.vocab_size], stored)


def check_import(expected: list[GPTModel], chunks: list[GPTModel], checkpoint: Path) -> None:
    """Megatron's own loader must find every weight of these ranks in an import."""
    for model in chunks:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    loaded = dist_checkpointing.load(sharded(chunks), str(iteration_folder(checkpoint, 0)))
    for index, (model, right) in enumerate(zip(chunks, expected, strict=True)):
        model.load_state_dict(loaded[f"model{index}"])
        parameters = dict(model.named_parameters())
        for name, parameter in right.named_parameters():
            assert torch.equal(parameters[name], parameter), name


def main() -> None:
    torch.set_num_threads(1)
    for number, case in enumerate(CASES):
        run_case(Path(sys.argv[1]) / str(number), case)


if __name__ == "__main__":
    main()
