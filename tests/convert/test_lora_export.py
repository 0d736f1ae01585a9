"""A LoRA checkpoint in PEFT and in transformers gives our logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_convert.hf_to_megatron import run_import
from checkpoints_convert.megatron_to_hf import run_export
from megatron_longpo.config.convert import ExportConfig, ImportConfig
from megatron_longpo.config.train import LoraConfig
from megatron_longpo.data.trees.packing import make_pack
from megatron_longpo.errors import UserError
from megatron_longpo.model.rope import rotary_angles
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.parallel.layout import lay_out_pack
from megatron_longpo.training import loop
from tests.parity.cases import Case, TinyModel
from tests.parity.harness import Shelf, load_hf
from tests.parity.peft_adapters import write_b
from tests.training.short_runs import CASE, short_config

LORA = LoraConfig(rank=3, alpha=8.0)
MODELS = (
    TinyModel(family="qwen2"),
    TinyModel(family="qwen3", tied=True, head_dim=16),
    TinyModel(family="llama"),
)


def lora_case(policy: TinyModel, **settings: Any) -> Case:
    return replace(
        CASE, name=f"lora_export_{policy.family}", policy=policy, reference=policy, **settings
    )


def saved_run(shelf: Shelf, folder: Path, case: Case) -> loop.Run:
    """A run whose B is not 0, saved after a step."""
    run = loop.prepare(short_config(shelf, folder, case=case, steps=1))
    write_b(run)
    loop.train(run)
    return run


def export(folder: Path, name: str, **settings: Any) -> str:
    destination = str(folder / name)
    source = str(folder / "checkpoints")
    run_export(ExportConfig(source=source, destination=destination, **settings))
    return destination


def our_logits(run: loop.Run, pair: int) -> tuple[list[int], Tensor]:
    """The chosen row of a pair, and the policy's logits [tokens, vocabulary] after each of it."""
    (model,) = unwrap_model(run.model)
    pack = lay_out_pack(make_pack([run.pairs.trees(pair)]), device=run.groups.device)
    gpt, tokens = model.policy, pack.policy
    with torch.no_grad():
        hidden = gpt.decoder(
            hidden_states=gpt.embedding(
                input_ids=tokens.input_ids[None], position_ids=tokens.position_ids[None]
            ),
            attention_mask=None,
            rotary_pos_emb=rotary_angles(model._chunks["policy"].inv_freq, tokens.position_ids),
            packed_seq_params=tokens.attention,
        ).squeeze(1)
    is_tied = gpt.share_embeddings_and_output_weights
    weight = gpt.shared_embedding_or_output_weight() if is_tied else gpt.output_layer.weight
    ids = CASE.rows[pair].chosen.input_ids.tolist()
    assert tokens.input_ids[: len(ids)].tolist() == ids, "the pack begins with the chosen row"
    return ids, (hidden[: len(ids)] @ weight.T)[:, : run.sources.policy.vocab_size]


def assert_our_logits(run: loop.Run, model: Any) -> None:
    model.eval()
    for pair in (0, 1, 3):
        ids, expected = our_logits(run, pair)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def loads_of(adapter: str, base: str) -> Sequence[Any]:
    """An adapter as the three ways of loading one give it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (
        PeftModel.from_pretrained(model, adapter),
        AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32),
        AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32),
    )


@pytest.mark.parametrize("policy", MODELS, ids=lambda model: model.family)
def test_peft_and_transformers_give_our_logits(
    policy: TinyModel, shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    run = saved_run(shelf, tmp_path, lora_case(policy, lora=LORA))
    merged = export(tmp_path, "merged", max_shard_size="40KB")
    assert_our_logits(run, load_hf(merged))
    assert len(list(Path(merged).glob("*.safetensors"))) > 1

    adapter = export(tmp_path, "adapter", lora="adapter")
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    base = settings["base_model_name_or_path"]
    for model in loads_of(adapter, base):
        assert_our_logits(run, model)
    # Neither the base alone nor the adapter on the original RoPE is the policy.
    for wrong in (
        load_hf(base),
        PeftModel.from_pretrained(load_hf(shelf.hf_folder(policy)), adapter),
    ):
        with pytest.raises(AssertionError, match="not close"):
            assert_our_logits(run, wrong)
    assert AutoTokenizer.from_pretrained(adapter).chat_template


def test_the_base_in_an_adapters_folder_has_the_policys_positions(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    case = lora_case(MODELS[0], lora=LORA)
    saved_run(shelf, tmp_path, case)
    adapter = Path(export(tmp_path, "adapter", lora="adapter"))
    config = json.loads((adapter / "base" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == case.rope_theta
    readme = (adapter / "README.md").read_text()
    assert f"{case.rope_theta:g}" in readme and shelf.hf_folder(MODELS[0]) in readme
    link = adapter / "base" / "model.safetensors"
    assert link.is_symlink() and link.samefile(Path(shelf.hf_folder(MODELS[0])) / link.name)
    assert not any(path.is_symlink() for path in adapter.iterdir())
    # A folder that has moved must not lead to the original model by accident.
    moved = adapter.rename(tmp_path / "moved")
    with pytest.raises(OSError, match="adapter/base"):
        AutoModelForCausalLM.from_pretrained(moved)


def test_an_adapter_under_the_bases_rope_names_the_base_itself(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    run = saved_run(shelf, tmp_path, lora_case(MODELS[0], lora=LORA, rope_theta=None))
    adapter = export(tmp_path, "adapter", lora="adapter")
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == shelf.hf_folder(MODELS[0])
    assert not (Path(adapter) / "base").exists()
    assert "theta" not in (Path(adapter) / "README.md").read_text()
    for model in loads_of(adapter, shelf.hf_folder(MODELS[0])):
        assert_our_logits(run, model)


def test_some_targets_only(shelf: Shelf, tmp_path: Path, single_process: Groups) -> None:
    lora = LoraConfig(rank=2, alpha=1.0, targets=("linear_fc1", "linear_proj"))
    run = saved_run(shelf, tmp_path, lora_case(MODELS[0], lora=lora, rope_theta=None))
    adapter = export(tmp_path, "adapter", lora="adapter")
    names = {name.split(".")[-3] for name in load_file(f"{adapter}/adapter_model.safetensors")}
    assert names == {"o_proj", "gate_proj", "up_proj"}
    for model in loads_of(adapter, shelf.hf_folder(MODELS[0])):
        assert_our_logits(run, model)
    assert_our_logits(run, load_hf(export(tmp_path, "merged")))


def test_bf16_is_merged_in_fp32_and_rounded_once(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    policy = MODELS[0]
    saved_run(shelf, tmp_path, lora_case(policy, lora=LORA, dtype="bf16"))
    adapter = load_file(export(tmp_path, "adapter", lora="adapter") + "/adapter_model.safetensors")
    merged = load_file(export(tmp_path, "merged") + "/model.safetensors")
    base = load_file(shelf.hf_folder(policy) + "/model.safetensors")
    assert {tensor.dtype for tensor in (*adapter.values(), *merged.values())} == {torch.bfloat16}
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{prefix}.lora_{which}.weight"].double() for which in "AB")
        whole = base[name].double() + LORA.alpha / LORA.rank * b @ a
        assert (merged[name] - whole.bfloat16()).abs().max() <= whole.abs().max() * 2**-8
        assert (merged[name] == whole.bfloat16()).float().mean() > 0.999
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"].bfloat16())


def test_a_base_that_moved_is_asked_for_and_another_refused(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    case = lora_case(MODELS[0], lora=LORA)
    original = shutil.copytree(shelf.hf_folder(MODELS[0]), tmp_path / "original")
    config = short_config(shelf, tmp_path, case=case, steps=1)
    config = replace(
        config,
        model=replace(config.model, hf_path=str(original)),
        reference=replace(config.reference, hf_path=str(original)),
    )
    run = loop.prepare(config)
    loop.train(run)
    moved = original.rename(tmp_path / "new place")
    with pytest.raises(UserError, match=r"original: no such folder, .* say where it is: --base"):
        export(tmp_path, "merged")
    with pytest.raises(UserError, match=r"its weights are not those that the adapters of"):
        export(tmp_path, "merged", base=shelf.hf_folder(replace(MODELS[0], seed=3)))
    assert not (tmp_path / "merged").exists()
    assert_our_logits(run, load_hf(export(tmp_path, "merged", base=str(moved))))


def test_whole_weights_have_no_adapter(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    source = shelf.hf_folder(MODELS[0])
    run_import(ImportConfig(source=source, destination=str(tmp_path / "checkpoints")))
    for settings in ({"lora": "adapter"}, {"base": source}):
        with pytest.raises(UserError, match=r"has whole weights and no adapters; leave it out"):
            export(tmp_path, "out", **settings)


def test_a_record_that_is_not_the_checkpoints_is_refused(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    saved_run(shelf, tmp_path, lora_case(MODELS[0], lora=LORA))
    path = tmp_path / "checkpoints" / "iter_0000001" / "lora.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "rank": 4}))
    with pytest.raises(UserError, match=r"lora_a has shape \[2, 3, 32\], lora\.json and"):
        export(tmp_path, "out")
    path.write_text(json.dumps({**record, "targets": ["linear_fc2"]}))
    with pytest.raises(UserError, match=r"is not of the adapters in lora\.json"):
        export(tmp_path, "out")


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_damaged_adapters_are_refused(
    lora: str, shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    run = loop.prepare(short_config(shelf, tmp_path, case=lora_case(MODELS[0], lora=LORA), steps=1))
    loop.train_step(run)
    (model,) = unwrap_model(run.model)
    with torch.no_grad():
        model.policy.decoder.layers[1].mlp.linear_fc2.adapter.lora_b[3, 1] = float("nan")
    loop.save(run, is_final=True)
    with pytest.raises(UserError, match=r"linear_fc2\.adapter\.lora_b of layer 1 holds NaN"):
        export(tmp_path, "out", lora=lora)
    assert not (tmp_path / "out").exists()


def test_only_an_adapters_folder_is_replaced(
    shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    saved_run(shelf, tmp_path, lora_case(MODELS[0], lora=LORA))
    export(tmp_path, "adapter", lora="adapter")
    with pytest.raises(UserError, match="give --overwrite"):
        export(tmp_path, "adapter", lora="adapter")
    export(tmp_path, "adapter", lora="adapter", overwrite=True)
    export(tmp_path, "merged")
    with pytest.raises(UserError, match="does not replace it"):
        export(tmp_path, "merged", lora="adapter", overwrite=True)
