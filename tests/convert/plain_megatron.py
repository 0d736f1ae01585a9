"""Under torchrun with 2 ranks: plain Megatron-Core loads an import of ours under TP2.

    torchrun --nproc-per-node 2 tests/convert/plain_megatron.py CHECKPOINT EXPECTED

Imports nothing of ours. CHECKPOINT is an iter_* folder, EXPECTED a torch file of some whole
tensors by GPTModel's parameter names. Prints `same: NAME` for each.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig


def main() -> None:
    checkpoint, expected_file = sys.argv[1:]
    expected = torch.load(expected_file)
    # Megatron asks for a CUDA device where it makes buffers.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    config = TransformerConfig(
        **expected["config"],
        tensor_model_parallel_size=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        ),
        vocab_size=expected["padded_vocab_size"],
        max_sequence_length=128,
        share_embeddings_and_output_weights=expected["tied"],
        position_embedding_type="rope",
    )
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)
    model.load_state_dict(state["model"])
    rank = parallel_state.get_tensor_model_parallel_rank()
    parameters = dict(model.named_parameters())
    for name, (whole, cut) in expected["tensors"].items():
        share = whole if cut is None else whole.chunk(2, dim=cut)[rank]
        assert torch.equal(parameters[name], share), name
        if rank == 0:
            print(f"same: {name}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
