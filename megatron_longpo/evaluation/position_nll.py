"""Rows for the negative log-likelihood of long documents by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_longpo.config.evaluation import NllConfig
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.frames import make_frame, plain_ids
from megatron_longpo.evaluation.haystack import read_documents
from megatron_longpo.evaluation.probes import ProbeBranch, ProbeRow, ProbeSet

KEY = "evaluation.nll"


@dataclass(frozen=True, kw_only=True, slots=True)
class NllSet:
    """Documents of one length, and the buckets of their positions."""

    probes: ProbeSet
    """Group n of a row is bucket n."""
    borders: tuple[int, ...]
    """Bucket n has the positions [borders[n], borders[n + 1])."""
    num_short: int
    """Documents that were too short, before enough were found."""


def make_nll(config: NllConfig, tokenizer: ChatTokenizer) -> NllSet:
    """Makes a row for each document: what the chat format puts before a user's text, then the text.

    Raises:
        UserError: if documents cannot be read, or none is long enough.
    """
    head = make_frame(tokenizer, "?", "1", "2").head
    borders = bucket_borders(config.bucket, config.length)
    rows: list[ProbeRow] = []
    num_short, longest = 0, 0
    for document in read_documents(config.documents, key=f"{KEY}.documents"):
        text = np.array(plain_ids(tokenizer, document.text), dtype=np.int32)
        ids = np.concatenate([head, text])
        longest = max(longest, len(ids))
        if len(ids) < config.length:
            num_short += 1
            continue
        ids = ids[: config.length]
        targets = np.arange(max(1, len(head)), len(ids))
        groups = np.searchsorted(borders, targets, side="right") - 1
        branch = ProbeBranch(input_ids=ids, targets=targets, groups=groups)
        rows.append(ProbeRow(id=document.id, branches=(branch,)))
        if len(rows) == config.samples:
            break
    if not rows:
        raise UserError(
            f"{KEY}.length ({config.length}): the longest of the {num_short} documents in "
            f"{config.documents} has {longest} tokens; use at most that"
        )
    return NllSet(probes=ProbeSet(rows), borders=borders, num_short=num_short)


def bucket_borders(first: int, length: int) -> tuple[int, ...]:
    """Returns 0, the first bucket's end, twice that, and so on up to the length."""
    borders = [0]
    end = first
    while end < length:
        borders.append(end)
        end *= 2
    return (*borders, length)
