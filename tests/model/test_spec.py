from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from transformers import AutoModelForCausalLM

from checkpoints_convert.gpt_weights import load_hf_weights
from checkpoints_convert.mapping import tensor_rules
from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import read_architecture
from megatron_longpo.model.norm import RMSNorm
from megatron_longpo.model.spec import (
    build_gpt,
    check_stages,
    padded_vocab_size,
    transformer_config,
)
from tests.convert.models import MODELS
from tests.model.attention.plain_attention import PlainAttention, forward_logits
from tests.model.test_norm import TINY
from tools.tiny_models import make_tiny_model

INPUT_IDS = torch.tensor([5, 299, 17, 17, 42, 0, 128, 250, 3, 77])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, single_process: Any, name: str) -> None:
    folder = make_tiny_model(folder=tmp_path, tokenizer=False, **MODELS[name])
    arch = read_architecture(folder)
    model = build_gpt(arch, transformer_config(arch, dtype="fp32"), core_attention=PlainAttention)
    load_hf_weights(model, arch, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(INPUT_IDS[None]).logits[0]
        actual = forward_logits(model, arch, INPUT_IDS)
    assert expected.std() > 0.05, "logits this flat would hide errors"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(
    tmp_path: Path, single_process: Any, recompute: Any
) -> None:
    folder = make_tiny_model("qwen3", tmp_path, tokenizer=False)
    arch = read_architecture(folder)
    gradients = []
    for setting in ("none", recompute):
        config = transformer_config(arch, dtype="fp32", recompute=setting)
        model = build_gpt(arch, config, core_attention=PlainAttention)
        load_hf_weights(model, arch, folder)
        forward_logits(model, arch, INPUT_IDS).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None and expected.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=0)


def test_recomputation_never_repeats_attention() -> None:
    selective = transformer_config(TINY, recompute="selective")
    assert selective.recompute_granularity == "selective"
    assert "mlp" in selective.recompute_modules
    assert "core_attn" not in selective.recompute_modules
    frozen = transformer_config(TINY, recompute="full", trainable=False)
    assert frozen.recompute_granularity is None


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_keys_are_those_of_a_stock_model(single_process: Any, tied: bool) -> None:
    arch = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True, tied_embeddings=tied)
    config = transformer_config(arch, dtype="fp32")
    stock = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=padded_vocab_size(arch, 1),
        max_sequence_length=64,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="none",
    )
    ours = build_gpt(arch, config, core_attention=PlainAttention)
    assert _tensor_keys(ours) == _tensor_keys(stock)
    assert set(_tensor_keys(ours)) == {rule.checkpoint_key for rule in tensor_rules(arch)}


def test_every_norm_is_ours(single_process: Any) -> None:
    arch = dataclasses.replace(TINY, qk_norm=True)
    model = build_gpt(arch, transformer_config(arch), core_attention=PlainAttention)
    names = {name for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    weights = [name for name, _ in model.named_parameters() if "layernorm" in name]
    assert {f"{name}.weight" for name in names} == set(weights)
    assert len(names) == 5


@pytest.mark.parametrize(("tensor", "expected"), [(1, 384), (2, 512), (4, 512), (8, 1024)])
def test_vocabulary_is_padded_for_every_rank(tensor: int, expected: int) -> None:
    assert padded_vocab_size(TINY, tensor) == expected


@pytest.mark.parametrize(
    ("pipeline", "virtual_pipeline", "layout", "message"),
    [
        (2, None, None, r"parallel\.pipeline \(2\) must not exceed the model's 1 layers"),
        (1, 2, None, r"parallel\.pipeline x virtual_pipeline \(2\) must not exceed"),
        (2, None, "Ett|tL", r"\(Ett\|tL\): its 3 layers \(t\) must be the model's 1"),
    ],
)
def test_stages_that_do_not_fit_the_model_are_refused(
    pipeline: int, virtual_pipeline: int | None, layout: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_stages(TINY, pipeline=pipeline, virtual_pipeline=virtual_pipeline, layout=layout)


def test_a_tensor_size_that_does_not_divide_the_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor \(3\) cannot split 4 heads"):
        transformer_config(TINY, tensor=3)


def test_megatron_counts_uneven_stages_as_we_do() -> None:
    """For every rank and chunk: how many layers, and which is the first."""
    arch = dataclasses.replace(TINY, num_layers=11)
    for pipeline, virtual, stages in ((4, None, (3, 3, 3, 2)), (2, 3, (0, 3, 2, 2, 4, 0))):
        config = transformer_config(
            arch, pipeline=pipeline, virtual_pipeline=virtual, stages=stages
        )
        layout = config.pipeline_model_parallel_layout
        assert isinstance(layout, PipelineParallelLayerLayout)
        assert layout.virtual_pipeline_model_parallel_size == (virtual or 1)
        per_stage = [
            layout.layout[stage % pipeline][stage // pipeline].count(LayerType.decoder)
            for stage in range(len(stages))
        ]
        assert per_stage == list(stages)


def test_interleaved_stages_are_sent_overlapped() -> None:
    """Megatron's other exchange takes the next rank's tensor for the previous one's."""
    arch = dataclasses.replace(TINY, num_layers=4)
    config = transformer_config(arch, pipeline=2, virtual_pipeline=2)
    assert config.overlap_p2p_comm and not config.batch_p2p_comm
    assert not config.deallocate_pipeline_outputs


def _tensor_keys(model: GPTModel) -> dict[str, int]:
    """Checkpoint keys with the number of tensors that share each of them."""
    keys: dict[str, int] = {}
    for value in model.sharded_state_dict().values():
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            keys[value.key] = keys.get(value.key, 0) + 1
    return keys
