"""Random preference rows of a chosen shape, for tests that need no text.

A row's tokens mean nothing; its structure is that of tokenised LongPO data: one document and
question, an answer a turn, further questions between them, and one short reference row a turn
that ends in the same answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow, TokenRow


def random_row(
    rng: np.random.Generator,
    vocab_size: int,
    *,
    common_prefix_length: int | None = None,
    prompt_length: int = 9,
    chosen_answer_lengths: Sequence[int] = (3,),
    rejected_answer_lengths: Sequence[int] = (4,),
    chunk_lengths: Sequence[int] | None = None,
    question_length: int = 2,
    trailing_length: int = 0,
    id: str = "row",
) -> PreferenceRow:
    """Returns one pair with as many turns as there are answer lengths.

    A long row is `prompt answer [question answer]... trailing`, answers labelled. The two long
    rows share exactly their first `common_prefix_length` tokens (default: the prompt), from 0 up
    to the whole shorter row; past the prompt it reaches into the answers, where the branches may
    disagree about which shared token is labelled. `chunk_lengths[i]` is the length of reference
    row i before its answer (default: 4 each).
    """
    num_turns = len(chosen_answer_lengths)
    assert len(rejected_answer_lengths) == num_turns >= 1 and vocab_size >= 2
    # Nothing predicts a first token, and answers without a question between them are one turn.
    assert prompt_length >= 1 and question_length >= 1
    chunk_lengths = [4] * num_turns if chunk_lengths is None else chunk_lengths
    assert len(chunk_lengths) == num_turns

    questions = [_tokens(rng, vocab_size, question_length) for _ in range(num_turns - 1)]
    prompt = _tokens(rng, vocab_size, prompt_length)
    trailing = _tokens(rng, vocab_size, trailing_length)

    def long_row(answer_lengths: Sequence[int]) -> tuple[np.ndarray, list[slice]]:
        parts, spans, end = [], [], 0
        for turn, length in enumerate(answer_lengths):
            before = prompt if turn == 0 else questions[turn - 1]
            parts += [before, _tokens(rng, vocab_size, length)]
            spans.append(slice(end + len(before), end + len(before) + length))
            end += len(before) + length
        return np.concatenate([*parts, trailing]), spans

    chosen_ids, chosen_spans = long_row(chosen_answer_lengths)
    rejected_ids, rejected_spans = long_row(rejected_answer_lengths)
    shared = prompt_length if common_prefix_length is None else common_prefix_length
    shorter = min(len(chosen_ids), len(rejected_ids))
    assert 0 <= shared <= shorter, f"common_prefix_length ({shared}) is past row end ({shorter})"
    rejected_ids[:shared] = chosen_ids[:shared]
    if shared < shorter and rejected_ids[shared] == chosen_ids[shared]:
        rejected_ids[shared] = (chosen_ids[shared] + 1) % vocab_size

    chunks = [_tokens(rng, vocab_size, length) for length in chunk_lengths]
    return PreferenceRow(
        id=id,
        source=f"random:{id}",
        chosen=labelled_row(chosen_ids, chosen_spans),
        rejected=labelled_row(rejected_ids, rejected_spans),
        reference_chosen=_reference_rows(chunks, chosen_ids, chosen_spans),
        reference_rejected=_reference_rows(chunks, rejected_ids, rejected_spans),
    )


def random_rows(
    rng: np.random.Generator, vocab_size: int, count: int, *, max_turns: int = 3
) -> list[PreferenceRow]:
    """Returns rows of mixed shapes, no two alike: lengths, turns and shared prefixes vary."""
    rows = []
    for index in range(count):
        num_turns = int(rng.integers(1, max_turns + 1))
        prompt_length = int(rng.integers(1, 24))
        rows.append(
            random_row(
                rng,
                vocab_size,
                prompt_length=prompt_length,
                # Half of them as real data has it, the others anywhere up to the first answer.
                common_prefix_length=(
                    None if index % 2 == 0 else int(rng.integers(0, prompt_length + 2))
                ),
                chosen_answer_lengths=[int(n) for n in rng.integers(1, 8, num_turns)],
                rejected_answer_lengths=[int(n) for n in rng.integers(1, 8, num_turns)],
                chunk_lengths=[int(n) for n in rng.integers(1, 12, num_turns)],
                question_length=int(rng.integers(1, 5)),
                trailing_length=int(rng.integers(0, 3)),
                id=f"row{index}",
            )
        )
    return rows


def labelled_row(input_ids: np.ndarray, answer_spans: Sequence[slice]) -> TokenRow:
    """Returns a row whose labels are its ids inside the spans and ignored outside."""
    labels = np.full_like(input_ids, IGNORED_LABEL)
    for span in answer_spans:
        labels[span] = input_ids[span]
    return TokenRow(input_ids=input_ids, labels=labels)


def _tokens(rng: np.random.Generator, vocab_size: int, length: int) -> np.ndarray:
    return rng.integers(0, vocab_size, length, dtype=np.int64)


def _reference_rows(
    chunks: Sequence[np.ndarray], long_ids: np.ndarray, spans: Sequence[slice]
) -> tuple[TokenRow, ...]:
    return tuple(
        labelled_row(
            np.concatenate([chunk, long_ids[span]]),
            [slice(len(chunk), len(chunk) + span.stop - span.start)],
        )
        for chunk, span in zip(chunks, spans, strict=True)
    )
