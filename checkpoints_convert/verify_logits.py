"""Compares fp32 logits of transformers and of our model, one model in memory at a time.

Our model is loaded from the imported checkpoint and runs as in training, with our attention over a
prefix tree and our rotary angles. Each text becomes two rows with a common first half.

Letters: T tokens of a row, e predictions of a row, v vocabulary.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from checkpoints_convert.gpt_weights import local_rules
from checkpoints_convert.hf_to_megatron import single_process
from checkpoints_convert.torch_dist import TorchDistReader
from megatron_longpo.data.trees.forest import Branch, Forest, Term, build_forest, concatenate
from megatron_longpo.errors import CheckFailed
from megatron_longpo.model.architectures import Architecture
from megatron_longpo.model.attention.kernel_choice import choose_kernel
from megatron_longpo.model.attention.tree_attention import TreeAttention
from megatron_longpo.model.rope import inverse_frequencies, rotary_angles
from megatron_longpo.model.spec import build_gpt, transformer_config
from megatron_longpo.parallel.context import NoExchange
from megatron_longpo.parallel.layout import lay_out

BRANCHES = (Term.LONG_CHOSEN, Term.LONG_REJECTED)
"""Terms of a text's two rows, by which a tree's edges tell their row."""


def compare_logits(
    hf_folder: str,
    iteration: Path,
    arch: Architecture,
    texts: Mapping[str, Sequence[int]],
    *,
    tolerance: float,
    folder: Path,
) -> str:
    """Compares the logits of both models after every token of the texts.

    Args:
        hf_folder: the folder that transformers reads.
        iteration: its import, which our model reads.
        arch: architecture of both.
        texts: token ids by the text's name.
        tolerance: the largest difference, times the logits' standard deviation if that is over 1.
        folder: holds transformers' logits while our model is in memory.

    Raises:
        CheckFailed: at the first difference; names the text and the token.
    """
    rows = {name: two_rows(ids) for name, ids in texts.items()}
    worst = spread = 0.0
    num_tokens = 0
    with single_process() as groups, torch.no_grad():
        _save_transformers_logits(hf_folder, rows, groups.device, folder)
        gc.collect()
        for name, number, logits in our_logits(iteration, arch, rows, groups.device):
            expected = torch.load(_logits_file(folder, name, number), mmap=True)
            difference = (logits.cpu() - expected).abs().amax(dim=1)
            scale = max(1.0, expected.std().item())
            is_close = difference <= tolerance * scale  # false for NaN
            if not is_close.all():
                token = int((~is_close).nonzero()[0])
                raise CheckFailed(
                    f"text {name}, after token {token}: they differ by "
                    f"{difference[token].item():.3g}, allowed is {tolerance * scale:.3g} "
                    f"(tolerance {tolerance:g} x standard deviation {scale:.3g})"
                )
            worst, spread = max(worst, difference.max().item()), max(spread, scale)
            num_tokens += len(logits)
    return (
        f"{num_tokens:,} tokens of {', '.join(texts)} in fp32: largest difference {worst:.2g}, "
        f"allowed {tolerance * spread:.2g}"
    )


def two_rows(ids: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Returns the text, and the text without its third quarter: both share the first half."""
    half, rest = len(ids) // 2, 3 * len(ids) // 4
    return ids, [*ids[:half], *ids[rest:]]


def our_logits(
    iteration: Path,
    arch: Architecture,
    rows: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    device: torch.device,
) -> Iterator[tuple[str, int, Tensor]]:
    """Yields name of the text, 0 or 1 for its row, and [T-1, v] logits of all tokens but the first.

    Needs Megatron's process groups.
    """
    gpt = load_import(iteration, arch, device)
    forest = concatenate(
        [_tree(pair) for pair in rows.values()],
        pairs=range(len(rows)),
    )
    tokens = lay_out(forest, device=device)
    hidden = gpt.decoder(
        hidden_states=gpt.embedding(
            input_ids=tokens.input_ids[None], position_ids=tokens.position_ids[None]
        ),
        attention_mask=None,
        rotary_pos_emb=rotary_angles(inverse_frequencies(arch).to(device), tokens.position_ids),
        packed_seq_params=tokens.attention,
    )
    weight = (
        gpt.shared_embedding_or_output_weight() if arch.tied_embeddings else gpt.output_layer.weight
    )
    edges = tokens.edges
    for text, (name, pair) in enumerate(rows.items()):
        for number, row in enumerate(pair):
            is_own = (edges.pairs == text) & (edges.terms & int(BRANCHES[number]) > 0)
            sources = edges.sources[is_own]
            assert torch.equal(
                tokens.position_ids[sources], torch.arange(len(row) - 1, device=device)
            )
            yield name, number, hidden[sources, 0] @ weight[: arch.vocab_size].T


def load_import(iteration: Path, arch: Architecture, device: torch.device) -> GPTModel:
    """Builds the model as in training, but in fp32, and loads a checkpoint's weights."""
    reader = TorchDistReader(iteration)
    chosen = choose_kernel("auto", device=device, dtype=torch.float32, head_dim=arch.head_dim)
    attention = functools.partial(TreeAttention, kernel=chosen.kernel, exchange=NoExchange())
    config = transformer_config(arch, dtype="fp32", trainable=False)
    gpt = build_gpt(arch, config, core_attention=attention)
    with torch.no_grad():
        for parameter, rule in local_rules(gpt, arch):
            parameter.copy_(reader.read(rule.checkpoint_key, layer=rule.layer))
    return gpt.to(device).eval()


def _tree(pair: tuple[Sequence[int], Sequence[int]]) -> Forest:
    """Puts both rows into one tree, with an edge to every token but a row's first."""
    branches = [
        Branch(
            input_ids=np.asarray(row, dtype=np.int64),
            terms=np.full(len(row), int(term)),
            turns=np.zeros(len(row), dtype=np.int64),
        )
        for row, term in zip(pair, BRANCHES, strict=True)
    ]
    return build_forest(branches, share=True)


def _save_transformers_logits(
    hf_folder: str,
    rows: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    device: torch.device,
    folder: Path,
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        hf_folder, dtype=torch.float32, attn_implementation="eager"
    )
    torch.nn.Module.to(model, device).eval()
    for name, pair in rows.items():
        for number, row in enumerate(pair):
            logits = model(torch.tensor([list(row)], device=device)).logits[0, :-1]
            torch.save(logits.cpu().clone(), _logits_file(folder, name, number))


def _logits_file(folder: Path, name: str, number: int) -> Path:
    return folder / f"logits-{name}-{number}.pt"
