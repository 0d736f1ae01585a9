"""Two torchrun agents on loopback, as on two nodes, give the run of one process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_longpo.engine.run_folder import plain_config
from megatron_longpo.parallel.groups import Groups
from megatron_longpo.training import loop
from tests.parity.harness import RELATIVE, Shelf
from tests.torchrun import ROOT, rank_environment
from tests.training.short_runs import metric_rows, short_config

TORCHRUN = (
    *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:PORT", "--local-addr", "127.0.0.1"),
    *("-m", "megatron_longpo", "train"),
)
LONGPO = (
    *("-m", "megatron_longpo", "train", "--nproc", "1", "--nnodes", "2"),
    *("--rdzv_endpoint", "127.0.0.1:PORT"),
)


@pytest.mark.parametrize("words", [TORCHRUN, LONGPO], ids=["torchrun", "longpo"])
def test_two_nodes_give_the_metrics_of_one_process(
    words: tuple[str, ...], shelf: Shelf, tmp_path: Path, single_process: Groups
) -> None:
    alone = short_config(shelf, tmp_path / "alone", steps=3, train={"global_batch_pairs": 4})
    loop.train(loop.prepare(alone))
    together = short_config(shelf, tmp_path / "nodes", steps=3, train={"global_batch_pairs": 4})
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump(plain_config(together)), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore"),
                *(word.replace("PORT", str(port)) for word in words),
                *("--config", str(file)),
            ],
            cwd=ROOT,
            env=rank_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for agent in agents:
        _, errors = agent.communicate(timeout=150)
        assert agent.returncode == 0, errors[-3000:]
    expected, found = metric_rows(tmp_path / "alone"), metric_rows(tmp_path / "nodes")
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("step", "tokens", "consumed_pairs"):
            assert ours[key] == theirs[key]
        for key in ("loss", "preference_loss", "nll_loss", "grad_norm", "logps/chosen"):
            assert ours[key] == pytest.approx(theirs[key], rel=RELATIVE), key
