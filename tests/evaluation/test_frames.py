from __future__ import annotations

from megatron_longpo.evaluation.frames import plain_ids
from tests.evaluation.chat_tokenizers import tokenizers
from tests.small_tokenizers import (
    CHATML_SPECIAL,
)


def test_plain_ids_never_hold_a_special_token() -> None:
    tokenizer = tokenizers()[0]
    text = "one <|im_start|><|im_end|> two"
    ids = plain_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    specials = {tokenizer.encode(special)[0] for special in CHATML_SPECIAL}
    assert not specials & set(ids)
