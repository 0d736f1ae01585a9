"""The server backend against llama.cpp's own server with SmolLM2; `make test-server` runs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_longpo.cli import main
from megatron_longpo.config.backends import BackendConfig, ServerConfig
from megatron_longpo.generation.backends.base import Completion, Request, Sampling
from megatron_longpo.generation.backends.factory import make_backend
from tools.smollm2 import find_gguf, make_tokenizer, read_fields

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def serving(port: int, log: Path) -> Iterator[str]:
    """The URL of a server, which ends with the block."""
    script = Path(__file__).with_name("llama_server.py")
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, str(script), str(find_gguf()), str(port)],
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(600):
            if found := re.search(r"listening at (http\S+)", log.read_text(errors="replace")):
                break
            assert process.poll() is None, log.read_text(errors="replace")
            time.sleep(0.1)
        assert found
        yield found.group(1)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def port() -> int:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("smollm2")
    make_tokenizer(read_fields(find_gguf())).save_pretrained(folder)
    return str(folder)


def options(tokenizer: str, url: str, documents: Path, output: Path) -> list[str]:
    return [
        "generate",
        f"--model={tokenizer}",
        "--backend=server",
        f"--server.endpoints=[{url}]",
        "--server.outage_minutes=0.05",
        "--server.concurrency=2",
        "--context_length=4096",
        f"--documents={documents}",
        f"--output={output}",
        "--instructions=template",
        "--turns=2",
        "--chunk_min_tokens=300",
        "--chunk_max_tokens=600",
        "--max_document_tokens=1200",
        "--max_new_tokens=24",
    ]


def test_our_template_and_the_server_s_give_the_same_answers(
    tokenizer: str, port: int, tmp_path: Path
) -> None:
    requests = [
        Request(
            messages=({"role": "user", "content": question},),
            sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=20),
            seed=1,
        )
        for question in ("What is a tide table?", "Name three colours.")
    ]

    async def run(api: str, url: str) -> list[Completion]:
        server = ServerConfig(endpoints=[url], api=api)  # type: ignore[arg-type]
        backend = make_backend(
            BackendConfig(model=tokenizer, backend="server", server=server, context_length=4096)
        )
        try:
            answers = await backend.complete(requests)
        finally:
            await backend.close()
        assert all(isinstance(answer, Completion) for answer in answers), answers
        return [answer for answer in answers if isinstance(answer, Completion)]

    with serving(port, tmp_path / "log") as url:
        chat = asyncio.run(run("chat", url))
        completions = asyncio.run(run("completions", url))
    assert [answer.text for answer in chat] == [answer.text for answer in completions]
    assert all(len(answer.text.split()) > 3 for answer in chat)
    assert chat[0].finished is False


def test_generate_is_stopped_by_a_lost_server_and_resumed(
    tokenizer: str, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents, output = tmp_path / "documents", tmp_path / "examples.jsonl"
    script = ROOT / "examples" / "quickstart" / "documents.py"
    subprocess.run([sys.executable, str(script), str(documents)], check=True)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(port, tmp_path / "log"))

        def end_after_the_first_example() -> None:
            shard = tmp_path / "examples.jsonl.partial" / "shard-0-of-1.jsonl"
            while not (shard.exists() and shard.stat().st_size):
                time.sleep(0.05)
            stack.close()

        watcher = threading.Thread(target=end_after_the_first_example, daemon=True)
        watcher.start()
        assert main(options(tokenizer, url, documents, output)) == 2
        watcher.join()
    error = capsys.readouterr().err
    assert "finished samples are kept, and the same command resumes" in error
    assert not output.exists()

    with serving(port, tmp_path / "log") as url:
        assert main(options(tokenizer, url, documents, output)) == 0
    examples = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({example["id"] for example in examples}) == len(examples) >= 3
    for example in examples:
        for turn in example["turns"]:
            assert turn["chosen"] and turn["rejected"] and turn["chosen"] != turn["rejected"]
