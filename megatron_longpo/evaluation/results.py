"""Results of an evaluation as plain data: a record for files, and flat numbers for curves.

A record has up to four keys:

    retrieval   a list of cells: kind, length, depth, samples, exact (share of the numbers whose
                tokens are all those of greedy decoding), token_accuracy, ends (share of the answers
                after whose full stop greedy decoding would end the turn), and, with --generate,
                generated (share of the numbers found in what the model wrote)
    nll         a list of buckets: start, stop, tokens, nll (nats a token)
    retention   prompts, positions, kl (nats a position), agreement (share of positions)
    suites      results of lm-evaluation-harness, by suite (suite_numbers.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_longpo.evaluation.position_nll import NllSet
from megatron_longpo.evaluation.probes import ProbeSet
from megatron_longpo.evaluation.retrieval import Question, RetrievalSet
from megatron_longpo.evaluation.suite_numbers import suite_numbers

Record = dict[str, Any]


def retrieval_cells(retrieval: RetrievalSet, hits: np.ndarray) -> list[Record]:
    """Returns cells in the order of the config; `hits` is [rows, groups] as in `scorer.Scores`."""
    counts = retrieval.probes.counts_RG
    cells: dict[tuple[str, int, float], list[Question]] = {}
    for question in retrieval.questions:
        cells.setdefault((question.kind, question.length, question.depth), []).append(question)
    found = []
    for (kind, length, depth), questions in cells.items():
        rows = [question.row for question in questions]
        groups = [question.group for question in questions]
        hit, count = hits[rows, groups], counts[rows, groups]
        ended = hits[rows, [question.end_group for question in questions]]
        found.append(
            {
                "kind": kind,
                "length": length,
                "depth": depth,
                "samples": len(questions),
                "exact": float((hit == count).mean()),
                "token_accuracy": float(hit.sum() / count.sum()),
                "ends": float(ended.mean()),
            }
        )
    return found


def nll_buckets(nll: NllSet, logps: np.ndarray) -> list[Record]:
    """Returns the buckets that have tokens; `logps` is [rows, groups]."""
    counts = nll.probes.counts_RG.sum(axis=0)
    sums = -logps.sum(axis=0)
    return [
        {
            "start": nll.borders[bucket],
            "stop": nll.borders[bucket + 1],
            "tokens": int(count),
            "nll": float(sums[bucket] / count),
        }
        for bucket, count in enumerate(counts)
        if count
    ]


def retention_numbers(probes: ProbeSet, divergences: np.ndarray, agreements: np.ndarray) -> Record:
    """Returns means over all positions of all prompts; the arrays are [rows]."""
    positions = int(probes.counts_RG.sum())
    return {
        "prompts": len(probes),
        "positions": positions,
        "kl": float(divergences.sum() / positions),
        "agreement": float(agreements.sum() / positions),
    }


def flat_numbers(record: Record) -> dict[str, float]:
    """Returns the numbers that are drawn over steps and compared between models.

    `retrieval/LENGTH` is the mean over depths and kinds; with several kinds,
    `retrieval/KIND/LENGTH` is the mean of one kind. `ends/LENGTH` and `generated/LENGTH` are the
    same for ended and written answers. Others are `nll/START-STOP`, `retention/kl`,
    `retention/agreement`, and `suite/...` (see `suite_numbers`).
    """
    numbers: dict[str, float] = {}
    cells = record.get("retrieval", [])
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    for name, key in (("retrieval", "exact"), ("ends", "ends"), ("generated", "generated")):
        having = [cell for cell in cells if cell.get(key) is not None]
        numbers |= _by_length(having, key, prefix=f"{name}/")
        if len(kinds) > 1:
            for kind in kinds:
                of_kind = [cell for cell in having if cell["kind"] == kind]
                numbers |= _by_length(of_kind, key, prefix=f"{name}/{kind}/")
    for bucket in record.get("nll", []):
        numbers[f"nll/{bucket['start']}-{bucket['stop']}"] = bucket["nll"]
    if retention := record.get("retention"):
        numbers["retention/kl"] = retention["kl"]
        numbers["retention/agreement"] = retention["agreement"]
    return numbers | suite_numbers(record.get("suites", {}))


def _by_length(cells: Sequence[Record], key: str, *, prefix: str) -> dict[str, float]:
    by_length: dict[int, list[Record]] = {}
    for cell in cells:
        by_length.setdefault(cell["length"], []).append(cell)
    return {
        f"{prefix}{length}": sum(cell[key] * cell["samples"] for cell in group)
        / sum(cell["samples"] for cell in group)
        for length, group in sorted(by_length.items())
    }
