"""Runs the covering array against the oracle and writes docs/parity.md (`make parity`).

python -m tests.parity.table [--only NUM_RANKS]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_longpo.data.jsonl import write_whole
from tests.parity.combination_ranks import combinations_name, results_name
from tests.parity.combinations import Combination, allowed_pairs, combinations_of, covering_array
from tests.parity.harness import Shelf
from tests.parity.steps import Differences
from tests.torchrun import ROOT, torchrun

PAGE = ROOT / "docs" / "parity.md"
RANKS = (1, 2, 4, 8)
FP32_LOSS, FP32_PARAMETERS, BF16_LOSS = 1e-5, 1e-4, 2e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    combination: Combination
    found: Differences

    @property
    def holds(self) -> bool:
        if self.combination.precision == "bf16":
            return self.found.loss <= BF16_LOSS
        return self.found.loss <= FP32_LOSS and self.found.parameters <= FP32_PARAMETERS


def run_combinations(
    num_ranks: int, shelf: Shelf, *, part: int = 0, parts: int = 1, timeout_s: float = 1800
) -> list[Result]:
    """Runs the combinations of that many ranks, in processes that are started once.

    Raises:
        RuntimeError: if a combination fails altogether; the message says which.
    """
    wanted = combinations_of(num_ranks, part=part, parts=parts)
    if not wanted:
        return []
    # Made here: ranks that made the same folder at once would get in each other's way.
    for one in wanted:
        case = one.steps.case
        shelf.hf_folder(case.policy)
        shelf.rows_file(case)
        if case.reference is not None:
            shelf.hf_folder(case.reference)
    # Not found out again by every rank.
    lines = [json.dumps(asdict(one)) + "\n" for one in wanted]
    write_whole(shelf.root / combinations_name(num_ranks), "".join(lines))
    results = shelf.root / results_name(num_ranks)
    results.unlink(missing_ok=True)
    done = torchrun(
        "tests/parity/combination_ranks.py",
        str(shelf.root),
        ranks=num_ranks,
        timeout_s=timeout_s,
    )
    if done.returncode:
        last = [line for line in done.stdout.splitlines() if line.startswith("runs: ")][-1:]
        raise RuntimeError(f"{last or 'before the first run'}\n{done.stderr[-6000:]}")
    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return [
        Result(
            combination=Combination(**one.pop("combination")),
            found=Differences(**one),
        )
        for one in found
    ]


def page(results: Sequence[Result]) -> str:
    """docs/parity.md."""
    fp32 = [result.found for result in results if result.combination.precision == "fp32"]
    bf16 = [result.found for result in results if result.combination.precision == "bf16"]
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers")
    )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    text = f"""\
# Parity

{len(results)} combinations of features, each trained for five optimizer steps and compared with
plain transformers and torch (`tests/oracle.py`: no packing, no sharing, one process). The rows
cover every allowed pair of values from two feature columns: {len(allowed_pairs())} pairs.
`make parity` runs them all and writes this page; `make test` runs a part of them.

Training: RMSprop with eps 1e-5, learning rate 1e-3, clipped gradients, batches of 4 of 6 pairs in
a random order. All differences are relative to the oracle. For loss and gradient norm it is the
largest of the five steps. For parameters it is the norm of the difference between both changes over
the five steps, divided by the norm of the oracle's change.

Measured with {versions}, Python {python}, over gloo on a CPU.

| | loss | gradient norm | parameters |
|---|---|---|---|
| fp32, largest | {max(f.loss for f in fp32):.1e} | {max(f.grad_norm for f in fp32):.1e} | \
{max(f.parameters for f in fp32):.1e} |
| fp32, allowed | {FP32_LOSS:.0e} | | {FP32_PARAMETERS:.0e} |
| bf16, largest | {max(f.loss for f in bf16):.1e} | {max(f.grad_norm for f in bf16):.1e} | |
| bf16, allowed | {BF16_LOSS:.0e} | | |

bf16 is compared with the oracle in fp32. In five such steps bf16 weights change by less than their
rounding, so their change is not compared.
"""
    head = ("layout", "objective", "reference", "prefix", "type", "turns", "optimizer", "recompute")
    head = (*head, "adapters", "loss", "grad norm", "parameters")
    lines = [
        text,
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *map(_row, results),
    ]
    return "\n".join(lines) + "\n"


def _row(result: Result) -> str:
    one, found = result.combination, result.found
    parameters = f"{found.parameters:.1e}" if one.precision == "fp32" else "-"
    cells = [*cells_of(one), f"{found.loss:.1e}", f"{found.grad_norm:.1e}", parameters]
    return "| " + " | ".join(cells) + " |"


def cells_of(one: Combination) -> list[str]:
    """A combination in the table's first columns."""
    return [
        one.layout,
        one.objective,
        one.reference,
        one.sharing,
        one.precision,
        one.turns,
        one.optimizer,
        one.recompute,
        one.adapters,
    ]


def _all_results(shelf: Shelf, ranks: Sequence[int]) -> Iterator[Result]:
    for num_ranks in ranks:
        results = run_combinations(num_ranks, shelf)
        for result in results:
            if not result.holds:
                print(f"differs: {result.combination}: {result.found}", flush=True)
        print(f"{num_ranks} ranks: {len(results)} combinations", flush=True)
        yield from results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=int, choices=RANKS, help="run these, and write no page")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = list(_all_results(Shelf(Path(folder)), RANKS if only is None else (only,)))
    if only is None:
        assert len(results) == len(covering_array())
        write_whole(PAGE, page(results))
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
