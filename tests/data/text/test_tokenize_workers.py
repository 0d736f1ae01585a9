"""`longpo tokenize` in several processes: the same files, counts and errors as in one."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.text.tokenize import choose_num_workers, run_tokenize
from megatron_longpo.data.workers import WorkerPool
from megatron_longpo.errors import UserError
from tests import small_tokenizers as small

CHUNK = "Twelve barrels were landed."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    small.byte_level(tuple(small.CHATML_SPECIAL), "<|im_end|>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(small.CHATML)
    return str(folder)


def example(number: int) -> dict[str, Any]:
    """Of any length; some are dropped for an empty answer, some are cut."""
    document = f"Document {number}. {CHUNK} " + "Nothing of note. " * (number * 7 % 40)
    rejected = " " if number % 9 == 4 else f"Seven {number}."
    turn = {"chunk": CHUNK, "question": "How many?", "chosen": "Twelve.", "rejected": rejected}
    return {"id": str(number), "document": document, "turns": [turn]}


def write(path: Path, values: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_files_and_counts_do_not_depend_on_the_workers(
    name: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = write(tmp_path / "e.jsonl", [example(number) for number in range(40)])
    outputs, prints = [], []
    for num_workers in (1, 2, 3):
        folder = tmp_path / str(num_workers)
        output = str(folder / name)
        summary = run_tokenize(
            TokenizeConfig(
                examples=examples,
                output=output,
                tokenizer=model,
                max_length=300,
                num_workers=num_workers,
            )
        )
        assert summary.num_rows == 36 and summary.num_cut_documents > 10
        assert dict(summary.dropped) == {"empty answer": 4}
        outputs.append(folder)
        prints.append(capsys.readouterr().out.replace(str(folder), ""))
    assert prints[0] == prints[1] == prints[2]
    for other in outputs[1:]:
        files = [str(p.relative_to(other)) for p in other.rglob("*") if p.is_file()]
        assert files
        _, different, missing = filecmp.cmpfiles(outputs[0], other, files, shallow=False)
        assert (different, missing) == ([], [])


def test_pairs_that_are_handed_out_together_keep_their_order(tmp_path: Path, model: str) -> None:
    pairs = [
        {"prompt": f"Which, {n}?", "chosen": f"This {n}.", "rejected": "No." if n % 5 else " "}
        for n in range(100)
    ]
    examples, written = write(tmp_path / "pairs.jsonl", pairs), []
    for num_workers in (1, 2):
        output = tmp_path / f"{num_workers}.jsonl"
        run_tokenize(
            TokenizeConfig(
                examples=examples, output=str(output), tokenizer=model, num_workers=num_workers
            )
        )
        written.append(output.read_bytes())
    assert written[0] == written[1]
    ids = [json.loads(line)["id"] for line in written[0].splitlines()]
    assert ids == [str(n) for n in range(100) if n % 5]


def test_the_first_error_is_the_same_line(tmp_path: Path, model: str) -> None:
    values = [example(number) for number in range(24)]
    values[7]["document"] = values[19]["document"] = ""
    examples = write(tmp_path / "e.jsonl", values)
    messages = []
    for num_workers in (1, 2):
        config = TokenizeConfig(
            examples=examples,
            output=str(tmp_path / "rows.jsonl"),
            tokenizer=model,
            num_workers=num_workers,
        )
        with pytest.raises(UserError) as raised:
            run_tokenize(config)
        messages.append(str(raised.value))
    assert messages[0] == messages[1] == f"{examples}:8: document is empty"
    assert os.listdir(tmp_path) == ["e.jsonl"]


def test_number_of_workers(tmp_path: Path, model: str) -> None:
    assert choose_num_workers(None, 15) == 1, "starting a process costs more than it saves"
    assert choose_num_workers(64, 3) == 3
    assert 1 <= choose_num_workers(None, 10**6) <= (os.cpu_count() or 1)


def dying_task() -> Any:
    return os._exit


def test_a_worker_that_dies_is_told() -> None:
    with (
        WorkerPool(dying_task, num_workers=2) as pool,
        pytest.raises(UserError, match=r"num_workers \(2\): a worker process has died"),
    ):
        list(pool.map([1, 1, 1]))


@pytest.mark.parametrize("stop", ["interrupt", pytest.param("kill", marks=pytest.mark.slow)])
def test_stopping_leaves_no_process_and_no_file(stop: str, tmp_path: Path, model: str) -> None:
    # Words that no tokenizer remembers: it would go on for long after it is stopped.
    words = " ".join(str(number**3) for number in range(60_000))
    long = example(1) | {"document": f"{words} {CHUNK}"}
    examples = write(tmp_path / "e.jsonl", [long | {"id": str(n)} for n in range(200)])
    command = [sys.executable, "-m", "megatron_longpo", "tokenize", "--examples", examples]
    command += ["--output", str(tmp_path / "rows.jsonl"), "--tokenizer", model]
    process = subprocess.Popen(
        [*command, "--num_workers", "2", "--max_length", "10000000"],
        start_new_session=True,  # Ctrl-C of a terminal reaches every process of the group
        # A shell that starts the tests in the background has Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    partial = tmp_path / "rows.jsonl.partial"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3, "the server that forks, and two workers"
    if stop == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1].splitlines()[-1:]
        assert (said, process.returncode) == (["longpo: interrupted"], 130)
        assert os.listdir(tmp_path) == ["e.jsonl"]
    else:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
