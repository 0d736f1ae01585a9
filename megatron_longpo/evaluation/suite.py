"""The probes of the section `evaluation`: made once, and scored at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_longpo.config.evaluation import EvaluationConfig
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.evaluation.position_nll import NllSet, make_nll
from megatron_longpo.evaluation.probes import ProbeSet
from megatron_longpo.evaluation.results import (
    Record,
    nll_buckets,
    retention_numbers,
    retrieval_cells,
)
from megatron_longpo.evaluation.retention import make_retention
from megatron_longpo.evaluation.retrieval import RetrievalSet, make_retrieval
from megatron_longpo.evaluation.scorer import KeptBase, Scorer, Track


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Probes by kind; a kind that is None is off."""

    retrieval: RetrievalSet | None = None
    nll: NllSet | None = None
    retention: ProbeSet | None = None

    @staticmethod
    def of(
        config: EvaluationConfig,
        load_tokenizer: Callable[[], ChatTokenizer],
        *,
        vocab_size: int,
    ) -> Suite:
        """Makes and tokenises all rows.

        Raises:
            UserError: for files that cannot be read, lengths that do not fit them, or a tokenizer
                of another model.
        """
        if config.is_off:
            return Suite()
        tokenizer = load_tokenizer()
        retrieval, nll, retention = config.retrieval, config.nll, config.retention
        suite = Suite(
            retrieval=None if retrieval is None else make_retrieval(retrieval, tokenizer),
            nll=None if nll is None else make_nll(nll, tokenizer),
            retention=None if retention is None else make_retention(retention, tokenizer),
        )
        for probes in suite.sets:
            probes.check_vocabulary(vocab_size, what=tokenizer.name)
        return suite

    @property
    def sets(self) -> list[ProbeSet]:
        found = [self.retention]
        found += [part.probes for part in (self.retrieval, self.nll) if part is not None]
        return [probes for probes in found if probes is not None]

    @property
    def summary(self) -> str:
        """One line that names everything that is measured."""
        parts = []
        if self.retrieval is not None:
            parts.append(f"{len(self.retrieval.questions)} questions about long texts")
        if self.nll is not None:
            length, left_out = self.nll.borders[-1], self.nll.num_short
            shorter = f" ({left_out} shorter ones left out)" if left_out else ""
            parts.append(f"{len(self.nll.probes)} documents of {length} tokens{shorter}")
        if self.retention is not None:
            parts.append(f"{len(self.retention)} short prompts")
        return ", ".join(parts)

    def split(self) -> Iterator[tuple[str, Suite]]:
        """Yields parts that can be measured one after the other, each with a name."""
        if self.retention is not None:
            yield "retention", Suite(retention=self.retention)
        if self.nll is not None:
            yield "nll", Suite(nll=self.nll)
        if self.retrieval is not None:
            for part in self.retrieval.split():
                first = part.questions[0]
                yield f"retrieval {first.kind} {first.length}", Suite(retrieval=part)

    def measure(self, scorer: Scorer, *, base: KeptBase | None, track: Track = iter) -> Record:
        """Scores everything; `base` is None if the model's reference, in memory, is its base."""
        record: Record = {}
        if self.retrieval is not None:
            scores = scorer.score(self.retrieval.probes, track=track)
            record["retrieval"] = retrieval_cells(self.retrieval, scores.hits)
        if self.nll is not None:
            scores = scorer.score(self.nll.probes, track=track)
            record["nll"] = nll_buckets(self.nll, scores.logps)
        if self.retention is not None:
            scores = scorer.score(self.retention, base=base, track=track)
            record["retention"] = retention_numbers(
                self.retention, scores.divergences, scores.agreements
            )
        return record
