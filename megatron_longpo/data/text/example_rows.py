"""Makes the row of one example or pair: tokenises conversations, cuts too long documents.

A long conversation has the document in its first turn, then the questions and the branch's own
earlier answers. A short one, for each turn, has the chunk, the question and the answer. Examples
without chunks, such as plain DPO sets, have no short ones.
"""

from __future__ import annotations

from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.progress import Dropped
from megatron_longpo.data.rows.schema import PreferenceRow, TokenRow
from megatron_longpo.data.text.chat import conversation_row
from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer, Message
from megatron_longpo.data.text.dpo_sets import DpoPair
from megatron_longpo.data.text.examples import Example, Turn, evidence_span, evidence_spans
from megatron_longpo.data.text.prompt_layout import opening_messages, shorten_document
from megatron_longpo.data.text.renderings import TemplateChangesText
from megatron_longpo.errors import UserError


def example_row(
    example: Example, tokenizer: ChatTokenizer, config: TokenizeConfig
) -> tuple[PreferenceRow, bool]:
    """Returns the row of an example and whether its document was cut. Raises `Dropped` for none."""
    if any(not turn.chosen.strip() or not turn.rejected.strip() for turn in example.turns):
        raise Dropped("empty answer")
    reference = {
        branch: _short_rows(example, branch, tokenizer, config.system)
        for branch in ("chosen", "rejected")
    }
    short_lengths = [len(row) for rows in reference.values() for row in rows]
    if max(short_lengths, default=0) > config.short_max_length:
        raise Dropped("short row over short_max_length")

    long_rows: dict[str, TokenRow] = {}

    def count_tokens(document: str) -> int:
        for branch in ("chosen", "rejected"):
            messages = _long_messages(example.turns, branch, document, config.system)
            long_rows[branch] = conversation_row(tokenizer, messages)
        return max(len(row) for row in long_rows.values())

    num_tokens = count_tokens(example.document)
    document_cut = num_tokens > config.max_length
    if document_cut:
        if config.too_long == "error":
            raise _too_long(example.source, num_tokens, config)
        if config.too_long == "drop":
            raise Dropped("long row over max_length")
        if any(
            turn.chunk is not None and evidence_span(example, turn) is None
            for turn in example.turns
        ):
            raise Dropped("long row over max_length, its chunk not found in the document")
        document = shorten_document(
            example.document,
            count_tokens=count_tokens,
            max_tokens=config.max_length,
            keep=evidence_spans(example),
            cut_from=config.cut_from,
            token_starts=tokenizer.token_starts,
        )
        if document is None:
            raise Dropped("long row over max_length without cutting its chunks")
    row = PreferenceRow(
        id=example.id,
        source=example.source,
        chosen=long_rows["chosen"],
        rejected=long_rows["rejected"],
        reference_chosen=reference["chosen"],
        reference_rejected=reference["rejected"],
    )
    return row, document_cut


def dpo_row(pair: DpoPair, tokenizer: ChatTokenizer, config: TokenizeConfig) -> PreferenceRow:
    """Returns the row of a pair of a DPO set, without short rows. Raises `Dropped` for none."""
    prompt: list[Message] = list(pair.prompt)
    if config.system is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": config.system}, *prompt]
    rows: dict[str, TokenRow] = {}
    for branch, answers in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if any(m["role"] == "assistant" and not m["content"].strip() for m in answers):
            raise Dropped("empty answer")
        try:
            rows[branch] = conversation_row(
                tokenizer, [*prompt, *answers], answers_from=len(prompt)
            )
        except TemplateChangesText:
            raise
        except UserError as error:  # such as roles that the template does not know
            raise UserError(f"{pair.source}: {error}") from error
    num_tokens = max(len(row) for row in rows.values())
    if num_tokens > config.max_length:
        if config.too_long == "error":
            raise _too_long(pair.source, num_tokens, config)
        raise Dropped("long row over max_length")
    return PreferenceRow(
        id=pair.id,
        source=pair.source,
        chosen=rows["chosen"],
        rejected=rows["rejected"],
        reference_chosen=(),
        reference_rejected=(),
    )


def _too_long(source: str, num_tokens: int, config: TokenizeConfig) -> UserError:
    return UserError(
        f"{source}: gives a row of {num_tokens} tokens, more than max_length "
        f"({config.max_length}); raise it or set too_long to truncate_document or drop"
    )


def _answer(turn: Turn, branch: str) -> str:
    return turn.chosen if branch == "chosen" else turn.rejected


def _short_rows(
    example: Example, branch: str, tokenizer: ChatTokenizer, system: str | None
) -> tuple[TokenRow, ...]:
    """Returns a row of chunk, question and answer for each turn; none if a turn has no chunk."""
    rows: list[TokenRow] = []
    for turn in example.turns:
        if turn.chunk is None:
            return ()
        messages = opening_messages(system, turn.chunk, turn.question)
        answer = {"role": "assistant", "content": _answer(turn, branch)}
        rows.append(conversation_row(tokenizer, [*messages, answer]))
    return tuple(rows)


def _long_messages(
    turns: tuple[Turn, ...], branch: str, document: str, system: str | None
) -> list[dict[str, str]]:
    messages = opening_messages(system, document, turns[0].question)
    for number, turn in enumerate(turns):
        if number > 0:
            messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": _answer(turn, branch)})
    return messages
