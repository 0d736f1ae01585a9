"""Settings of `longpo generate`; imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_longpo.config.backends import BackendConfig
from megatron_longpo.config.fields import limits
from megatron_longpo.generation.questions.filters import DEFAULT_FILTERS, FilterName


@dataclass(kw_only=True)
class GenerateConfig(BackendConfig):
    """A model writes its own preference examples: answers from a chunk and from the whole text."""

    documents: str
    """A file, a folder or a pattern (`docs/**/*.md`) of text, Markdown, reStructuredText, LaTeX,
    code, JSONL and Parquet; a `save_to_disk` folder; or a hub id, which is streamed."""
    text_column: str = "text"
    """The column of JSONL, Parquet and data sets that holds the text."""
    subset: str | None = None
    """Configuration of a hub id that has several, such as a language; null = its default."""
    split: str | None = None
    """Split of a data set; null = the only one, or `train`."""
    encoding: str | None = None
    """Encoding of text files; null = UTF-8, or what a byte-order mark says, or a guess."""
    html: Literal["drop", "extract", "keep"] = "drop"
    """What happens to HTML pages; `extract` makes Markdown of them (needs the extra `html`)."""
    document_kind: Literal["auto", "text", "markdown", "rst", "latex", "code"] = "auto"
    """What the structure of documents is read as; auto = by the file's ending, else by its text."""
    near_duplicates: float | None = 0.8
    """Documents whose sets of word 5-grams are this alike (Jaccard similarity) to an earlier one's
    are dropped; null = only documents with the same text are."""
    min_document_tokens: int | None = None
    """Shorter documents are dropped; null = no bound."""
    max_document_tokens: int | None = None
    """Longer documents are cut at their end, in the example too, or dropped; null = no bound."""
    long_documents: Literal["cut", "drop"] = "cut"
    """What happens to documents over max_document_tokens."""
    max_document_bytes: int = 16_000_000
    """Larger documents are dropped and not tokenised."""
    output: str
    """The examples file; until it is complete, they are in the folder output.partial, from which
    the same command goes on."""
    shard: str | None = None
    """`i/n`: write every n-th document from the i-th on, i from 0, as other processes write the
    others; whoever ends last writes output. null = all documents."""
    merge: bool = False
    """Write nothing new: put what is finished in output, without what is not."""
    report: bool = True
    """Write output's .report.html beside it: histograms, and three examples to read."""
    instructions: str = "model"
    """Who asks: `model` (the model writes questions); `template` (questions about facts found in a
    chunk) or `planted` (facts made up and put into a chunk) for models too small to ask well; or a
    file of questions: text with one a line, or JSONL with `question` and `document_id` or none."""
    least_questions: int | None = field(default=None, metadata=limits(at_least=1))
    """With `model`: take a chunk where at least so many questions parse; null = exactly the four
    that were asked for, as in the paper."""
    fact_kinds: list[str] | None = None
    """With `template` or `planted`: kinds of facts to ask for (docs/generate.md); null = all
    but, with `planted`, those that small models seldom answer."""
    fact_split: Literal["train", "test"] = "train"
    """With `planted`: `test` has other kinds, wordings and names, for evaluation."""
    require_fact: bool = False
    """With `template` or `planted`: keep a turn only where the chosen answer holds the fact."""
    system: str | None = None
    """System prompt; give `longpo tokenize` the same."""
    turns: int = 4
    """Most turns of an example; each asks about another chunk."""
    chunk_min_tokens: int | None = None
    """Shorter chunks are dropped; null = half of the model's context."""
    chunk_max_tokens: int | None = None
    """Most tokens of a chunk; null = 30,000 for each 32,768 of the model's context."""
    max_prompt_tokens: int | None = None
    """Most tokens the model reads for a rejected answer; null = its context less max_new_tokens.
    A longer document is cut for that prompt (not in the example), never in a chunk asked about."""
    max_new_tokens: int = 1024
    """Most tokens of an answer."""
    filters: list[FilterName] = field(default_factory=lambda: list(DEFAULT_FILTERS))
    """Answers to drop, by name (docs/generate.md). Not among the default: `loop` drops rejected
    answers that repeat themselves too, `unfinished` and `chosen_unfinished` those that reached
    max_new_tokens before their end."""
    chosen_temperature: float = 0.0
    """Sampling temperature of chosen answers; 0 = greedy."""
    chosen_top_p: float = 1.0
    """Nucleus of chosen answers."""
    rejected_temperature: float = 0.0
    """Sampling temperature of rejected answers; 0 = greedy, as in the paper."""
    rejected_top_p: float = 1.0
    """Nucleus of rejected answers."""
    rejected_candidates: int = 1
    """Answers from the whole document for each turn; the first is written at rejected_temperature.
    The first good one is the rejected answer, other good ones are kept in meta."""
    candidate_temperature: float = 1.0
    """Sampling temperature of the candidates after the first, with rejected_top_p."""
    question_temperature: float = 0.7
    """Sampling temperature of questions that the model writes."""
    question_top_p: float = 0.9
    """Nucleus of questions that the model writes."""
    limit: int | None = None
    """Most documents read; null = all."""
    seed: int = 42
    """Of every choice and sample; the same inputs give the same file on a CPU."""
    overwrite: bool = False
    """Replace an output that exists, and begin anew rather than resume."""
