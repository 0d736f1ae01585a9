"""Ranges and rules of the configs of generate, judge, tokenize, inspect and evaluate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.cli import main
from megatron_longpo.config.backends import BackendConfig, ServerConfig, check_backend
from megatron_longpo.config.generate import GenerateConfig, resolve_generate, shard_place
from megatron_longpo.config.judge import JudgeConfig, resolve_judge
from megatron_longpo.errors import UserError

ROOT = Path(__file__).parents[2]
SECRET = "sk-very/secret"

START = {
    "generate": ["generate", "--model=m", "--documents=d", "--output=o"],
    "judge": ["judge", "e.jsonl", "--model=m", "--output=o"],
    "tokenize": ["tokenize", "--examples=e", "--output=o", "--tokenizer=t"],
    "inspect": ["inspect", "rows.jsonl"],
    "evaluate": ["evaluate", "m", "--output=o"],
}
"""Command -> a command line that lacks nothing."""


def generate_config(**changes: Any) -> GenerateConfig:
    return GenerateConfig(**{"model": "m", "documents": "d", "output": "o.jsonl", **changes})


@pytest.mark.parametrize(
    ("command", "key", "value", "rule"),
    [
        ("generate", "turns", "0", "must be at least 1. The default is 4"),
        ("generate", "limit", "0", "must be at least 1"),
        ("generate", "max_document_bytes", "0", "must be at least 1"),
        ("generate", "chunk_min_tokens", "0", "must be at least 1. The default is null"),
        ("generate", "rejected_top_p", "0", "must be above 0 and at most 1. The default is 1"),
        ("generate", "chosen_temperature", "-1", "must be at least 0. The default is 0"),
        ("generate", "candidate_temperature", "0", "must be above 0. The default is 1"),
        ("generate", "near_duplicates", "80", "must be above 0 and at most 1. The default is 0.8"),
        ("generate", "num_threads", "0", "must be at least 1"),
        ("judge", "least_support", "6", "must be at least 1 and at most 5"),
        ("tokenize", "max_length", "1", "must be at least 2. The default is 131072"),
        ("tokenize", "short_max_length", "1", "must be at least 2. The default is 32768"),
        ("tokenize", "num_workers", "0", "must be at least 1. The default is null"),
        ("inspect", "sample", "-1", "must be at least 0. The default is 1000"),
        ("inspect", "html_samples", "0", "must be at least 1"),
        ("inspect", "max_chars", "0", "must be at least 1"),
        ("inspect", "row", "-1", "must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_line(
    command: str,
    key: str,
    value: str,
    rule: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"# {command}\n{key}: {value}\n")
    assert main([*START[command], "--config", str(file)]) == 2
    assert f"{file}:2: {key} ({value}) {rule}" in capsys.readouterr().err
    assert main([*START[command], f"--{key}={value}"]) == 2
    assert f"longpo: --{key} ({value}) {rule}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("generate", "require_fact: true", ":2: require_fact (true): only questions of"),
        ("generate", "encoding: utf-9", ":2: encoding (utf-9): Python knows no such encoding"),
        ("generate", "shard: 8/8", ":2: shard (8/8): i counts from 0"),
        ("generate", "server: {endpoints: [h]}\nbackend: server", ":2: server.endpoints[0] (h): "),
        ("judge", "documents_at_once: 2\nbackend: server", ":2: documents_at_once (2): is for"),
        ("evaluate", "suite: rulers", ":2: suite (rulers): no such suite. The nearest is ruler"),
        ("evaluate", "suite: ruler\nharness: {lengths: [0]}", ":3: harness.lengths (0) must be"),
        ("evaluate", "suite: ruler\nharness: {lengths: []}", ":3: harness.lengths: must be one"),
        (
            "evaluate",
            "suite: mt_bench\nharness: {judge: {endpoints: [h]}}",
            ":3: harness.judge.endpoints[0] (h): must be a URL",
        ),
    ],
)
def test_settings_that_contradict_are_named_with_their_line(
    command: str, text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"# {command}\n{text}\n")
    assert main([*START[command], "--config", str(file)]) == 2
    assert f"longpo: {file}{expected}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": 0}, r"^turns \(0\) must be at least 1"),
        (
            {"min_document_tokens": 9, "max_document_tokens": 8},
            r"min_document_tokens \(9\): must not exceed max_document_tokens \(8\)",
        ),
        ({"rope_theta": 1e7}, r"rope_theta \(1e\+07\): needs context_length"),
        ({"fact_kinds": ["donor"]}, "fact_kinds: only instructions: template and planted"),
        ({"instructions": "template", "fact_kinds": []}, r"fact_kinds \(\[\]\): name at least one"),
        (
            {"shard": "0/2", "overwrite": True},
            r"overwrite \(true\): would remove what other shards write; remove o.jsonl and "
            r"o.jsonl.partial before",
        ),
    ],
)
def test_what_generate_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_generate(generate_config(**changes))


def test_what_generate_accepts() -> None:
    for changes in (
        {},
        {"shard": "1/2"},
        {"shard": "0/2", "overwrite": True, "merge": True},
        {"instructions": "planted", "require_fact": True, "fact_kinds": ["maker"]},
        {
            "rope_theta": 1e7,
            "context_length": 9,
            "chunk_min_tokens": 1,
            "chunk_max_tokens": 2,
        },
    ):
        config = generate_config(**changes)
        assert resolve_generate(config) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8/8", r"shard \(8/8\): i counts from 0, so n shards are 0/n to n-1/n; .*--array=0-7"),
        ("0/0", r"shard \(0/0\): i counts from 0"),
        ("1", r"shard \(1\): must be i/n, such as 0/8"),
        ("-1/4", r"shard \(-1/4\): must be i/n"),
    ],
)
def test_bad_shards_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shard_place(text)
    assert shard_place(None) == (0, 1)
    assert shard_place("7/8") == (7, 8)


@pytest.mark.parametrize(
    ("urls", "changes", "message"),
    [
        ([], {}, r"server.endpoints \(\[\]\): backend: server needs at least one URL"),
        (["host:8000"], {}, r"server.endpoints\[0\] \(host:8000\): must be a URL such as http"),
        (["http://me:pass@host/v1"], {}, r"server.endpoints\[0\] \(host\): must hold no password"),
        (["http://h/v1"], {"api_key_env": SECRET}, "server.api_key_env: must be the name of an en"),
    ],
)
def test_bad_servers(urls: list[str], changes: dict[str, Any], message: str) -> None:
    server = ServerConfig(endpoints=urls, **changes)
    with pytest.raises(UserError, match=message) as caught:
        check_backend(BackendConfig(model="m", backend="server", server=server))
    assert SECRET not in str(caught.value) and "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": ServerConfig(endpoints=["http://h/v1"])}, "has no server.endpoints; set backe"),
        ({"backend": "server", "rope_theta": 1e7}, r"rope_theta \(1e\+07\): a server has its own"),
        (
            {"backend": "server", "documents_at_once": 2},
            r"documents_at_once \(2\): .* server.concurrency",
        ),
    ],
)
def test_settings_of_the_other_backend(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_judge(JudgeConfig(model="m", examples="e", output="o", **changes))


def test_these_checks_need_no_torch_and_little_time() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from megatron_longpo.cli import main\n"
        f"lines = {list(START.values())!r}\n"
        "wrong = ['--turns=0', '--backend=server', '--num_workers=0', '--row=-1', '--suite=x']\n"
        "for line, option in zip(lines, wrong, strict=True):\n"
        "    assert main([*line, option]) == 2, line\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'numpy', 'megatron', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert seconds < 2, seconds\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == len(START), done.stderr
