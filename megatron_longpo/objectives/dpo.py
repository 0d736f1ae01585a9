"""DPO on the long document: LongPO's arithmetic with a reference that saw the long document."""

from __future__ import annotations

from dataclasses import dataclass

from .longpo import LongPO


@dataclass(frozen=True, kw_only=True, slots=True)
class DPO(LongPO):
    """L_n = preference_weight * l( (P_w - R_w) - (P_l - R_l) ) + nll_weight * NLL_n.

    Source: Equation 7 of DPO (arXiv 2305.18290). R_w and R_l are conditioned on the same long rows
    as P_w and P_l: `reference.context: long`, the default of this objective. Arithmetic, shapes and
    options are `LongPO`'s. If policy and reference have the same weights and RoPE, z = 0 and the
    preference loss is ln 2.
    """
