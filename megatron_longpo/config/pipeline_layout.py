"""The notation of `parallel.pipeline_layout`, which is Megatron's."""

from __future__ import annotations

import re

from megatron_longpo.errors import UserError

KEY = "parallel.pipeline_layout"


def parse_layout(text: str) -> tuple[int, ...]:
    """Returns the number of layers of each stage: `Ettt|(tt|)*2tL` -> (3, 2, 2, 1).

    `|` ends a stage, `E` is the embedding, `t` a layer, `L` the output layer and the loss; `x*3`
    and `(xy)*3` repeat, commas mean nothing.

    Raises:
        UserError: if it is no layout of a model like ours.
    """
    unrolled = text.replace(",", "").replace(" ", "")
    for repeated in (r"\(([^()]*)\)\*(\d+)", r"([^()*\d])\*(\d+)"):
        unrolled = re.sub(repeated, lambda match: match[1] * int(match[2]), unrolled)
    stages = unrolled.split("|")
    if unknown := sorted(set(unrolled) - set("EtL|")):
        hint = "; models here have no multi-token prediction" if "m" in unknown else ""
        raise UserError(
            f"{KEY} ({text}): {' '.join(unknown)} is none of E (embedding), t (layer), L (loss), | "
            f"(next stage), x*n and (xy)*n{hint}. Write for example Ett|tttL"
        )
    if not re.fullmatch(r"E[t|]*L", unrolled):
        raise UserError(
            f"{KEY} ({text}): it must begin with the only E and end with the only L. Write for "
            "example Ett|tttL"
        )
    if "" in stages:
        raise UserError(
            f"{KEY} ({text}): stage {stages.index('') + 1} has nothing to do. Give it a layer (t), "
            "or remove it"
        )
    return tuple(stage.count("t") for stage in stages)
