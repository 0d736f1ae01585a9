from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_longpo.config.harness import HarnessConfig
from megatron_longpo.config.suites import read_suite, suite_names
from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.harness.tasks import load_task, parts_of, shorten


def test_long_documents_lose_their_middle(model: str, data: Path) -> None:
    config = HarnessConfig(data=str(data))
    suite = read_suite("infinitebench", config)
    part = next(part for part in parts_of(suite) if part.task.endswith("qa_en"))
    task = load_task(suite, part, config, tokenizer=model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = task.dataset["longbook_qa_en"][0]["context"]
    assert len(tokenizer(whole).input_ids) > 4000
    kept = shorten(task, "context", tokenizer=tokenizer, most=1000, chat_template=True)
    text = task.dataset["longbook_qa_en"][0]["context"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": task.doc_to_text(task.dataset["longbook_qa_en"][0])}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert kept == 2
    assert 960 < len(prompt) + 40 <= 1000
    assert text[:300] == whole[:300] and text[-300:] == whole[-300:]
    with pytest.raises(UserError, match="does not fit even without its document"):
        shorten(task, "context", tokenizer=tokenizer, most=80, chat_template=True)


def test_every_suite_has_the_papers_shots() -> None:
    config = HarnessConfig()
    config.judge.endpoints = ["http://localhost:1/v1"]
    suites = {name: read_suite(name, config) for name in suite_names()}
    shots = {name: suite.shots for name, suite in suites.items() if suite.shots}
    assert shots == {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5}
    assert len(suites["ruler"].tasks) == 13 and suites["ruler"].lengths is not None
    assert [suites["ruler"].lengths[n] for n in (0, -1)] == [4096, 131072]
    assert len(parts_of(suites["mmlu"])) == 57 and len(parts_of(suites["longbench"])) == 21
