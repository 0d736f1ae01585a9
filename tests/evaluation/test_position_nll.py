from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_longpo.config.evaluation import NllConfig
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.haystack import filler_text
from megatron_longpo.evaluation.position_nll import bucket_borders, make_nll
from tests.evaluation.chat_tokenizers import tokenizers


def test_buckets_double_and_hold_every_position(tmp_path: Path) -> None:
    assert bucket_borders(4096, 32768) == (0, 4096, 8192, 16384, 32768)
    assert bucket_borders(100, 250) == (0, 100, 200, 250)
    tokenizer = tokenizers()[0]
    for number, length in enumerate((6000, 200, 7000, 8000)):
        (tmp_path / f"{number}.txt").write_text(filler_text(seed=number)[:length])
    config = NllConfig(documents=str(tmp_path), length=1000, bucket=300, samples=2)
    nll = make_nll(config, tokenizer)
    assert (len(nll.probes), nll.num_short) == (2, 1)
    head = len(tokenizer.encode("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"))
    for row, number in zip(nll.probes.rows, (0, 2), strict=True):
        (branch,) = row.branches
        text = filler_text(seed=number)[:8000]
        assert branch.input_ids[head:].tolist() == tokenizer.encode(text)[: 1000 - head]
        assert branch.targets.tolist() == list(range(head, 1000))
    assert nll.probes.counts_RG.tolist() == [[300 - head, 300, 400]] * 2
    with pytest.raises(UserError, match=r"evaluation\.nll\.length \(99999\): the longest of the 4"):
        make_nll(replace(config, length=99999), tokenizer)
