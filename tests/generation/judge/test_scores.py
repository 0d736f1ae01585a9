from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation.judge import run as judge
from megatron_longpo.generation.judge import scores as judge_scores
from megatron_longpo.generation.shards.locks import hold
from tests.generation.judge.judging import Judge, config


def test_scores_of_other_settings_are_refused(examples: str, backend: Judge) -> None:
    backend.broken = lambda text: "Chunk number 2" in text
    with pytest.raises(
        UserError, match=r"3 of 3 examples could not be judged \(3 x server that ans"
    ):
        judge.run_judge(config(examples))
    backend.broken = lambda text: False
    scores = Path(config(examples).output + ".scores")
    scores.write_text('{"settings":"other","example":0,"turns":[]}\n')
    with pytest.raises(UserError, match=r"scores:1: was scored with another model, examples or"):
        judge.run_judge(config(examples))
    assert judge.run_judge(config(examples, overwrite=True)).num_kept == 3


def test_damaged_scores_are_named(
    examples: str, backend: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "_fingerprint", lambda *_: "f")
    scores = Path(config(examples).output + ".scores")
    for line in ('{"settings":"f"}', '{"settings":"f","example":0,"turns":[{"good":1}]}'):
        scores.write_text(line + "\n")
        with pytest.raises(UserError, match=r"scores:1: is damaged \(.*remove the line"):
            judge.run_judge(config(examples))


FULL_DISK = """
import resource, sys
from pathlib import Path
from megatron_longpo.errors import UserError
from megatron_longpo.generation.judge.scores import ScoreFile, TurnScores
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
with ScoreFile.opened(Path(sys.argv[1]), "f", overwrite=False) as file:
    try:
        for index in range(1000):
            file.append(index, [TurnScores(support=5, better=1.0)])
    except UserError as error:
        print(error)
"""


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    output = tmp_path / "judged.jsonl"
    command = [sys.executable, "-c", FULL_DISK, str(output)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "judged.jsonl.scores: cannot be written (File too large); what is finished is" in told
    assert [one.name for one in tmp_path.iterdir()] == ["judged.jsonl.scores"]
    data = (tmp_path / "judged.jsonl.scores").read_bytes()
    assert data.endswith(b"\n") and len(data) > 4_900
    with judge_scores.ScoreFile.opened(output, "f", overwrite=False) as file:
        assert sorted(file.scores) == list(range(data.count(b"\n")))


def test_two_judges_of_one_output(examples: str, backend: Judge) -> None:
    lock = Path(config(examples).output + ".lock")
    with (
        hold(lock, what="x"),
        pytest.raises(UserError, match=rf"process {os.getpid()} on \S+; wai"),
    ):
        judge.run_judge(config(examples, overwrite=True))
    assert backend.asked == []
    assert judge.run_judge(config(examples)).num_kept == 3
    assert not lock.exists()
