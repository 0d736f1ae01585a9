"""Haystacks: the user's documents, or plain built-in sentences, as one stream of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

from megatron_longpo.data.text.chat_tokenizer import ChatTokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.frames import plain_ids
from megatron_longpo.generation.documents.formats import ReadOptions
from megatron_longpo.generation.documents.reading import DocumentSet

NUM_SENTENCES = 2000
"""Sentences of the built-in text, some 25,000 tokens; longer haystacks repeat it."""

ENOUGH_TOKENS = 1_000_000
"""Documents after these are not read. It is constant, so that rows of one length do not depend on
the other lengths that are measured."""

_WHO = (
    *("The ferryman", "A gardener", "The old teacher", "A young carpenter", "The night watch"),
    *("Her neighbour", "The baker's son", "A travelling clerk", "The choir", "A stray dog"),
    *("The harbour master", "Their cousin", "The librarian", "A group of children", "The miller"),
)
_WHAT = (
    *("walked along the canal", "mended a broken fence", "waited for the evening train"),
    *("carried two baskets of apples", "painted the window frames", "listened to the rain"),
    *("swept the courtyard", "read an old newspaper", "looked for a lost glove"),
    *("sorted letters by colour", "watched the boats come in", "planted a row of beans"),
    *("told a story about the hills", "counted the lamps in the street", "sharpened a pencil"),
)
_WHEN = (
    *("before breakfast", "after the market had closed", "on a grey morning in March"),
    *("while the kettle was warming", "without saying a word", "for most of the afternoon"),
    *("as the clouds moved east", "until the bells had stopped", "with great care"),
    *("because nobody else had time", "as on every Thursday", "and then went home"),
)


def filler_text(*, seed: int = 0) -> str:
    """Returns sentences without numbers or facts to ask for; the same for the same seed."""
    rng = random.Random(seed)
    sentences = [
        f"{rng.choice(_WHO)} {rng.choice(_WHAT)} {rng.choice(_WHEN)}." for _ in range(NUM_SENTENCES)
    ]
    paragraphs = [" ".join(sentences[at : at + 6]) for at in range(0, len(sentences), 6)]
    return "\n\n".join(paragraphs)


class Haystack:
    """An endless stream of tokens that knows where sentences and lines end."""

    def __init__(self, texts: Iterable[str], tokenizer: ChatTokenizer) -> None:
        """Reads texts until there are `ENOUGH_TOKENS` or no more texts."""
        parts: list[np.ndarray] = []
        num_tokens = 0
        for text in texts:
            parts.append(np.array(plain_ids(tokenizer, text.rstrip() + "\n\n"), dtype=np.int32))
            num_tokens += len(parts[-1])
            if num_tokens >= ENOUGH_TOKENS:
                break
        self.ids = np.concatenate(parts)
        kinds, inverse = np.unique(self.ids, return_inverse=True)
        ends = np.array([_ends_sentence(tokenizer.decode([int(kind)])) for kind in kinds])
        self._is_end = ends[inverse]

    def take(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `length` tokens from `start`, and [length] bool: after which a sentence ends."""
        places = np.arange(start, start + length) % len(self.ids)
        return self.ids[places], self._is_end[places]


def read_haystack(path: str | None, tokenizer: ChatTokenizer, *, key: str) -> Haystack:
    """Reads the documents of the setting `key`, or the built-in text if `path` is None."""
    if path is None:
        return Haystack([filler_text()], tokenizer)
    texts = (document.text for document in read_documents(path, key=key))
    return Haystack(texts, tokenizer)


def read_documents(path: str, *, key: str) -> DocumentSet:
    """Reads the documents under a path; raises `UserError` if there is none."""
    documents = DocumentSet(path, options=ReadOptions(key=key))
    if next(iter(documents), None) is None:
        reasons = ", ".join(documents.dropped)
        raise UserError(f"{key} ({path}): holds no usable text ({reasons}); give text files")
    return documents


def _ends_sentence(text: str) -> bool:
    return "\n" in text or text.rstrip().endswith((".", "!", "?"))
