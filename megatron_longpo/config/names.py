"""Names and choices that more than one room uses, each defined once.

A config field, the code that acts on it and the message that lists the choices all take them from
here. This file imports nothing but `typing`.
"""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["bf16", "fp32"]
"""Number format of weights and activations, gradients or optimizer state."""
AttentionKernel = Literal["auto", "fa4", "cudnn+te", "te", "cudnn", "flash_attn", "varlen", "sdpa"]
"""`auto` takes the fastest kernel that passes a trial on this machine."""
LayerKind = Literal["te", "local"]
"""Transformer layers of Transformer Engine or of Megatron-Core."""
Layers = Literal["auto", LayerKind]
"""`auto` takes Transformer Engine's where they run."""
Recompute = Literal["none", "selective", "all_but_attention", "full"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp"]
ContextComm = Literal["a2a", "all_gather", "a2a+all_gather"]
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
OptimizerName = Literal["rmsprop", "adam"]
LrSchedule = Literal["cosine", "constant", "linear"]
ReferenceMode = Literal["online", "cached", "none"]
ReferenceContext = Literal["short", "long"]
"""What the reference reads: the chunk of each turn, or the long document."""

ObjectiveName = Literal[
    "longpo",
    "dpo",
    "ipo",
    "simpo",
    "orpo",
    "sft",
    "sft_rejected",
    "sft_short_to_long",
    "solopo_dpo",
    "solopo_simpo",
    "solopo_orpo",
    "opsdl",
]
Turns = Literal["summed", "per_turn"]
NllScope = Literal["chosen_row", "chosen_answers"]
"""Tokens of the NLL term that a config may choose."""
NllTokens = Literal[NllScope, "rejected_answers", "short_chosen_answers"]
"""Tokens of the NLL term that an objective may ask for."""
AnswerScope = Literal["chosen_answers", "rejected_answers"]
RowName = Literal["long_chosen", "long_rejected", "short_chosen", "short_rejected"]
"""An answer under a context: the long document, or the short chunk of its turn."""
ROW_NAMES: tuple[RowName, ...] = get_args(RowName)

RetrievalKind = Literal["passkey", "multi_needle"]
"""Questions about texts with hidden numbers."""

RowTooLong = Literal["error", "drop", "truncate_document"]
"""What happens to a row over `max_length`."""
CutFrom = Literal["middle", "tail"]
"""Part of a document that is cut."""
TextFormat = Literal["longpo", "dpo"]
"""Forms of preference examples: documents with turns, or prompts with two answers."""
HtmlMode = Literal["drop", "extract", "keep"]
"""What happens to HTML pages among the documents."""
DocumentKind = Literal["text", "markdown", "rst", "latex", "code"]
"""What the structure of a document is read as."""
DocumentTooLong = Literal["cut", "drop"]
"""What happens to a document over `max_document_tokens`."""
FactSplit = Literal["train", "test"]
"""Which facts are planted: those for training, or those for evaluation."""
FilterName = Literal[
    "empty",
    "wordless",
    "refusal",
    "repetition",
    "thinking",
    "language",
    "same",
    "chosen_loop",
    "loop",
    "chosen_unfinished",
    "unfinished",
]
"""Reasons to drop an answer. `chosen_loop` is `loop` for chosen answers alone, and so on."""
DEFAULT_FILTERS: tuple[FilterName, ...] = tuple(
    name
    for name in get_args(FilterName)
    # Short-context models write loops after long documents: a preference worth learning.
    if name not in ("loop", "chosen_unfinished", "unfinished")
)
