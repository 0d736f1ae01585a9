"""Evaluation in plain transformers and torch: one sequence, one forward pass, all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_longpo.evaluation.suite import Suite

Record = dict[str, Any]


def logps_of(model: Any, ids: Any) -> Tensor:
    """[S - 1, V] fp32: log-probabilities of the next token after each token but the last."""
    row = torch.as_tensor(ids, dtype=torch.int64)
    with torch.no_grad():
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def oracle_record(policy: Any, base: Any, suite: Suite) -> Record:
    """What `Suite.measure` gives."""
    record: Record = {}
    if suite.retrieval is not None:
        cells: dict[Any, list[tuple[int, int, bool]]] = {}
        for question in suite.retrieval.questions:
            branch = suite.retrieval.probes.rows[question.row].branches[question.group]
            logps = logps_of(policy, branch.input_ids)
            targets = torch.as_tensor(branch.targets)
            wanted = torch.as_tensor(branch.input_ids.astype("int64"))[targets]
            # The last one is the end of the turn.
            *hits, ends = (logps[targets - 1].argmax(-1) == wanted).tolist()
            key = (question.kind, question.length, question.depth)
            cells.setdefault(key, []).append((sum(hits), len(hits), ends))
        record["retrieval"] = [
            {
                "kind": kind,
                "length": length,
                "depth": depth,
                "samples": len(found),
                "exact": sum(hit == count for hit, count, _ in found) / len(found),
                "token_accuracy": sum(h for h, _, _ in found) / sum(c for _, c, _ in found),
                "ends": sum(ends for *_, ends in found) / len(found),
            }
            for (kind, length, depth), found in cells.items()
        ]
    if suite.nll is not None:
        sums: dict[int, list[float]] = {}
        for row in suite.nll.probes.rows:
            (branch,) = row.branches
            logps = logps_of(policy, branch.input_ids)
            for position, bucket in zip(branch.targets, branch.groups, strict=True):
                token = int(branch.input_ids[position])
                sums.setdefault(int(bucket), []).append(-float(logps[position - 1, token]))
        borders = suite.nll.borders
        record["nll"] = [
            {
                "start": borders[bucket],
                "stop": borders[bucket + 1],
                "tokens": len(sums[bucket]),
                "nll": sum(sums[bucket]) / len(sums[bucket]),
            }
            for bucket in sorted(sums)
        ]
    if suite.retention is not None:
        kls: list[float] = []
        agreed: list[bool] = []
        for row in suite.retention.rows:
            (branch,) = row.branches
            places = torch.as_tensor(branch.targets) - 1
            p = logps_of(policy, branch.input_ids)[places]
            q = logps_of(base, branch.input_ids)[places]
            kls += (q.double().exp() * (q.double() - p.double())).sum(-1).tolist()
            agreed += (p.argmax(-1) == q.argmax(-1)).tolist()
        record["retention"] = {
            "prompts": len(suite.retention),
            "positions": len(kls),
            "kl": sum(kls) / len(kls),
            "agreement": sum(agreed) / len(agreed),
        }
    return record
