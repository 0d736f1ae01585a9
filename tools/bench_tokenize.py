"""Times `longpo tokenize` beside the bare tokenizer on the same documents, with the same workers.

    python -m tools.bench_tokenize --tokenizer models/hf --num_workers 1 2

The documents are the standard library's sources, 32K to 128K tokens each, with two turns that have
chunks of about 4K tokens. *Bare* is the Rust tokenizer on every text that has to be tokenised once:
each document, chunk, question and answer. *transformers* is the same texts through the tokenizer's
own call. *rows* reads the examples, makes the rows and writes them, as the command does. All run in
worker processes that have started, in turns; figures are medians over the rounds, also of the ratio
to bare in the same round. The second ratio is of CPU seconds, which other work on the machine
disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
from transformers import AutoTokenizer

from megatron_longpo.config.tokenize import TokenizeConfig
from megatron_longpo.data.text.examples import Example, Turn, write_examples
from megatron_longpo.data.text.sets import TextSet
from megatron_longpo.data.text.tokenize import WORKER_IMPORTS, ExampleTokenizer, write_outcomes
from megatron_longpo.data.workers import WorkerPool

CHUNK_CHARS = 16_000
ANSWER = "It reads the whole file first, and only then decides what each of its lines means. "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--num_documents", type=int, default=24)
    parser.add_argument("--max_length", type=int, default=262144)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.num_documents < 8 * max(arguments.num_workers):
        # The ids of a few texts are remembered: a worker must not meet them again in a round.
        parser.error("--num_documents must be at least 8 for each worker")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "examples.jsonl"))
        examples = make_examples(arguments.tokenizer, arguments.lengths, arguments.num_documents)
        write_examples(path, examples)
        texts = TextSet(path)
        configs = {
            f"rows, {kind}": TokenizeConfig(
                examples=path,
                output=str(Path(folder, name)),
                tokenizer=arguments.tokenizer,
                max_length=arguments.max_length,
                overwrite=True,
            )
            for kind, name in (("JSONL", "rows.jsonl"), ("folder", "rows"))
        }
        for num_workers in arguments.num_workers:
            compare(texts, configs, num_workers, arguments.rounds)
            shutil.rmtree(Path(folder, "rows"))


def compare(
    texts: TextSet, configs: dict[str, TokenizeConfig], num_workers: int, rounds: int
) -> None:
    tokenizer = next(iter(configs.values())).tokenizer
    tasks: dict[str, Callable[[], Callable]] = {
        "bare": partial(BareTokenizer, texts, tokenizer, is_rust=True),
        "transformers": partial(BareTokenizer, texts, tokenizer, is_rust=False),
        **{name: partial(ExampleTokenizer, texts, config) for name, config in configs.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    cpu: dict[str, list[float]] = {name: [] for name in tasks}
    num_tokens = 0
    with contextlib.ExitStack() as stack:
        pools = {
            name: stack.enter_context(
                WorkerPool(task, num_workers=num_workers, imports=WORKER_IMPORTS)
            )
            for name, task in tasks.items()
        }
        for pool in pools.values():
            list(pool.map(range(len(texts))))  # starts the workers
        for _, (name, pool) in itertools.product(range(rounds), pools.items()):
            start, cpu_start = time.perf_counter(), cpu_seconds()
            results = pool.map(range(len(texts)))
            if name in configs:
                with contextlib.redirect_stdout(io.StringIO()):
                    write_outcomes(results, texts, configs[name])
            else:
                num_tokens = sum(results)
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(cpu_seconds() - cpu_start)
    print(f"{len(texts)} examples, {num_tokens} tokens, {num_workers} workers, {rounds} rounds")
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio, cpu_ratio = (
            statistics.median(bare / own for bare, own in zip(of["bare"], of[name], strict=True))
            for of in (seconds, cpu)
        )
        print(
            f"  {name:14} {median:7.2f} s ({min(values):.2f} to {max(values):.2f})  "
            f"{num_tokens / median / 1e3:7.0f} thousand tokens/s  {ratio:.2f} of bare, "
            f"{cpu_ratio:.2f} by CPU",
            flush=True,
        )


def cpu_seconds() -> float:
    """Returns CPU seconds of this process and its workers, until now."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


class BareTokenizer:
    """Tokenises every text of an example once and returns how many tokens they are."""

    def __init__(self, texts: TextSet, tokenizer: str, *, is_rust: bool) -> None:
        self._texts = texts
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._is_rust = is_rust

    def __call__(self, index: int) -> int:
        example = self._texts[index]
        assert isinstance(example, Example)
        texts = [example.document]
        for turn in example.turns:
            assert turn.chunk is not None
            texts += [turn.chunk, turn.question, turn.chosen, turn.rejected]
        return sum(len(self._encode(text)) for text in texts)

    def _encode(self, text: str) -> list[int]:
        if self._is_rust:
            rust = self._tokenizer.backend_tokenizer
            return rust.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def make_examples(tokenizer: str, lengths: list[int], number: int) -> Iterator[Example]:
    """Returns examples whose documents have about these lengths, in tokens, in turn."""
    rust = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    files = itertools.cycle(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    for number_, length in zip(range(number), itertools.cycle(lengths), strict=False):
        parts: list[str] = []
        num_tokens = 0
        while num_tokens < length:
            part = next(files).read_text(encoding="utf-8", errors="replace")
            ids = rust.encode(part, add_special_tokens=False)
            if num_tokens + len(ids) > length:
                part = part[: ids.offsets[length - num_tokens][0]]
            num_tokens += len(ids)
            parts.append(part)
        document = "\n".join(parts)
        yield Example(
            id=f"{number_}-{length}",
            document=document,
            turns=tuple(
                Turn(
                    chunk=document[start : start + CHUNK_CHARS],
                    chunk_span=(start, start + CHUNK_CHARS),
                    question=f"What does part {start} of document {number_} do first?",
                    chosen=ANSWER * 4,
                    rejected=ANSWER * 2,
                )
                for start in (1000, len(document) // 2)
            ),
        )


if __name__ == "__main__":
    main()
