"""Names and choices that more than one room uses, each defined once.

A config field, the code that acts on it and the message that lists the choices all take them from
here. This file imports nothing but `typing`.
"""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["bf16", "fp32"]
"""Type of weights and activations."""
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
