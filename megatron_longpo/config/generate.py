"""The config of `longpo generate`."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_longpo.config.backends import BackendConfig, check_backend
from megatron_longpo.config.fields import check_limits, limits
from megatron_longpo.config.names import (
    DEFAULT_FILTERS,
    DocumentKind,
    DocumentTooLong,
    FactSplit,
    FilterName,
    HtmlMode,
)
from megatron_longpo.errors import UserError


@dataclass(kw_only=True)
class GenerateConfig(BackendConfig):
    """A model writes its own preference examples: answers from a chunk and from the whole text."""

    documents: str
    """A file, a folder or a pattern (`docs/**/*.md`) of text, Markdown, reStructuredText, LaTeX,
    code, JSONL and Parquet; a `save_to_disk` folder; or a hub id, which is streamed."""
    text_column: str = "text"
    """Column of JSONL, Parquet and data sets that holds the text."""
    subset: str | None = None
    """Configuration of a hub id that has several, such as a language; null = its default."""
    split: str | None = None
    """Split of a data set; null = the only one, or `train`."""
    encoding: str | None = None
    """Encoding of text files; null = UTF-8, or what a byte-order mark says, or a guess."""
    html: HtmlMode = "drop"
    """What happens to HTML pages; `extract` turns them into Markdown (needs the extra `html`)."""
    document_kind: Literal["auto", DocumentKind] = "auto"
    """Kind of text that documents are divided as; auto = by the file's ending, else by its text."""
    near_duplicates: float | None = field(default=0.8, metadata=limits(above=0, at_most=1))
    """Drop a document whose set of word 5-grams is this similar (Jaccard) to that of an earlier
    one; null = drop only documents with the same text."""
    min_document_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Shorter documents are dropped; null = no bound."""
    max_document_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Longer documents are cut at their end, also in the example, or dropped; null = no bound."""
    long_documents: DocumentTooLong = "cut"
    """What happens to documents over max_document_tokens."""
    max_document_bytes: int = field(default=16_000_000, metadata=limits(at_least=1))
    """Larger documents are dropped and not tokenised."""
    output: str
    """Examples file to write. Until it is complete, examples are in the folder output.partial; the
    same command resumes from there."""
    shard: str | None = None
    """`i/n`: write every n-th document from the i-th on, with i from 0, while other processes write
    the others; the last one to end writes output. null = all documents."""
    merge: bool = False
    """Write nothing new: put finished documents into output, and leave out the others."""
    report: bool = True
    """Also write a page beside output, with the ending .report.html: histograms and three examples
    to read."""
    instructions: str = "model"
    """Who asks the questions. `model` = the model writes them; `template` = questions about facts
    found in a chunk, `planted` = about facts made up and put into a chunk, both for models too
    small to ask well; or a file of questions: text with one a line, or JSONL with `question` and
    optionally `document_id`."""
    least_questions: int | None = field(default=None, metadata=limits(at_least=1))
    """With `model`: use a chunk if at least this many questions can be parsed; null = exactly the
    four that were asked for, as in the paper."""
    fact_kinds: list[str] | None = None
    """With `template` or `planted`: kinds of facts to ask for (docs/generate.md); null = all, with
    `planted` without those that small models seldom answer."""
    fact_split: FactSplit = "train"
    """With `planted`: `test` has other kinds, wordings and names, for evaluation."""
    require_fact: bool = False
    """With `template` or `planted`: keep a turn only if the chosen answer holds the fact."""
    system: str | None = None
    """System prompt; give `longpo tokenize` the same."""
    turns: int = field(default=4, metadata=limits(at_least=1))
    """Maximum turns of an example; each asks about another chunk."""
    chunk_min_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Shorter chunks are dropped; null = half of the model's context."""
    chunk_max_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum tokens of a chunk; null = 30,000 for each 32,768 of the model's context."""
    max_prompt_tokens: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum tokens that the model reads for a rejected answer; null = its context minus
    max_new_tokens. A longer document is cut for that prompt, but not in the example; a chunk that
    is asked about is never cut."""
    max_new_tokens: int = field(default=1024, metadata=limits(at_least=1))
    """Maximum tokens of an answer."""
    filters: list[FilterName] = field(default_factory=lambda: list(DEFAULT_FILTERS))
    """Answers to drop, by name (docs/generate.md). Three are not on by default: `loop` also drops
    rejected answers that repeat themselves; `unfinished` and `chosen_unfinished` drop answers that
    reached max_new_tokens before their end."""
    chosen_temperature: float = field(default=0.0, metadata=limits(at_least=0))
    """Sampling temperature of chosen answers; 0 = greedy."""
    chosen_top_p: float = field(default=1.0, metadata=limits(above=0, at_most=1))
    """Nucleus (top-p) of chosen answers."""
    rejected_temperature: float = field(default=0.0, metadata=limits(at_least=0))
    """Sampling temperature of rejected answers; 0 = greedy, as in the paper."""
    rejected_top_p: float = field(default=1.0, metadata=limits(above=0, at_most=1))
    """Nucleus (top-p) of rejected answers."""
    rejected_candidates: int = field(default=1, metadata=limits(at_least=1))
    """Answers to write from the whole document for each turn, the first at rejected_temperature.
    The first good one becomes the rejected answer; other good ones are kept in meta."""
    candidate_temperature: float = field(default=1.0, metadata=limits(above=0))
    """Sampling temperature of the candidates after the first, with rejected_top_p. Greedy ones
    would all be the same."""
    question_temperature: float = field(default=0.7, metadata=limits(at_least=0))
    """Sampling temperature of questions that the model writes."""
    question_top_p: float = field(default=0.9, metadata=limits(above=0, at_most=1))
    """Nucleus (top-p) of questions that the model writes."""
    limit: int | None = field(default=None, metadata=limits(at_least=1))
    """Maximum documents to read; null = all."""
    seed: int = 42
    """Seed of every choice and sample; on a CPU, the same inputs give the same file."""
    overwrite: bool = False
    """Replace an existing output, and start again instead of resuming."""


def resolve_generate(config: GenerateConfig) -> GenerateConfig:
    """Returns the config, checked; what depends on the model is filled when it is loaded."""
    check_limits(config)
    check_backend(config)
    _check_documents(config)
    _check_questions(config)
    if config.rope_theta is not None and None in (
        config.context_length,
        config.chunk_min_tokens,
        config.chunk_max_tokens,
    ):
        raise UserError(
            f"rope_theta ({config.rope_theta:g}): needs context_length, the tokens that the model "
            "is to read with it, and chunk_min_tokens and chunk_max_tokens, the chunks that it "
            "reads without trouble"
        )
    _, num_shards = shard_place(config.shard)
    if config.overwrite and num_shards > 1 and not config.merge:
        raise UserError(
            f"overwrite (true): would remove what other shards write; remove {config.output} and "
            f"{config.output}.partial before the first shard begins"
        )
    return config


def shard_place(text: str | None) -> tuple[int, int]:
    """Returns (i, n) of `i/n`; i counts from 0, as in `sbatch --array=0-7`. None is (0, 1)."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None:
        raise UserError(f"shard ({text}): must be i/n, such as 0/8 for the first of eight")
    index, count = int(found[1]), int(found[2])
    if index >= count:
        raise UserError(
            f"shard ({text}): i counts from 0, so n shards are 0/n to n-1/n; with sbatch use "
            f"--array=0-{max(count - 1, 0)}"
        )
    return index, count


def _check_documents(config: GenerateConfig) -> None:
    if config.encoding is not None:
        try:
            codecs.lookup(config.encoding)
        except LookupError:
            raise UserError(
                f"encoding ({config.encoding}): Python knows no such encoding; try utf-8 or latin-1"
            ) from None
    low, high = config.min_document_tokens, config.max_document_tokens
    if low is not None and high is not None and low > high:
        raise UserError(
            f"min_document_tokens ({low}): must not exceed max_document_tokens ({high})"
        )


def _check_questions(config: GenerateConfig) -> None:
    asks_for_facts = config.instructions in ("template", "planted")
    if config.require_fact and not asks_for_facts:
        raise UserError(
            "require_fact (true): only questions of instructions: template and planted have facts"
        )
    if config.fact_kinds is not None and not asks_for_facts:
        raise UserError("fact_kinds: only instructions: template and planted ask for facts")
    if config.fact_kinds == []:
        raise UserError("fact_kinds ([]): name at least one, or leave it null for all")
