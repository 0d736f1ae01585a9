from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from megatron_longpo.config.harness import HarnessConfig
from megatron_longpo.config.suites import read_suite
from megatron_longpo.evaluation.harness import ruler
from megatron_longpo.evaluation.harness.tasks import TASK_FILES, Part, load_task


def rows_of(model: str, data: Path, name: str, length: int, **settings: Any) -> list[Any]:
    config = HarnessConfig(data=str(data), lengths=(length,), **settings)
    suite = read_suite("ruler", config)
    part = Part(task=name, group=None, length=length)
    return list(load_task(suite, part, config, tokenizer=model).dataset["test"])


@pytest.mark.parametrize("name", list(read_suite("ruler", HarnessConfig()).tasks))
def test_rulers_rows_fit_their_length(name: str, model: str, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    task_file = TASK_FILES / "ruler" / f"{name.removeprefix('ruler_')}.yaml"
    text = task_file.read_text().replace("!function ", "")
    settings = yaml.safe_load(text)
    new_tokens = settings.get("generation_kwargs", {"max_gen_toks": 128})["max_gen_toks"]
    assert ruler.NEW_TOKENS[settings["metadata"]["maker"]] == new_tokens
    for length in (2048, 4096):
        rows = rows_of(model, data, name, length, samples=3)
        assert len(rows) == 3
        for row in rows:
            ids = tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": row["input"]},
                    {"role": "assistant", "content": row["gen_prefix"]},
                ],
                continue_final_message=True,
                return_dict=False,
            )
            assert len(ids) + new_tokens == row["length"] <= length
            if name not in ("ruler_qa_hotpot",):  # yes and no stand nowhere
                assert all(answer in row["input"] for answer in row["outputs"][:1])
        assert len({row["input"] for row in rows}) == 3
    # The same rows again, others under another seed.
    assert rows == rows_of(model, data, name, 4096, samples=3)
    if "qa" not in name:
        assert rows != rows_of(model, data, name, 4096, samples=3, seed=1)


def test_rulers_scores() -> None:
    doc = {"outputs": ["12", "34"]}
    assert ruler.score_all(doc, ["It is 12."])["score"] == 0.5
    assert ruler.score_any(doc, ["It is 12."])["score"] == 1
    assert ruler.score_any({"outputs": ["The North"]}, ["the north"])["score"] == 1
    assert ruler.score_any(doc, ["No."])["score"] == 0
