"""examples/slurm/generate.sbatch in a real Slurm: an array that is cancelled or told to stop."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_longpo.config.generate import GenerateConfig
from megatron_longpo.generation import generate
from tests.generation.scripted import DOCUMENT
from tests.slurm_cluster import Cluster, running_cluster
from tests.torchrun import rank_environment

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "generate.sbatch"
NUM_DOCUMENTS = 24

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def values(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings without an output."""
    documents = tmp_path_factory.mktemp("documents")
    for number in range(NUM_DOCUMENTS):
        text = DOCUMENT.replace("Thing", f"Thing{number}x")
        (documents / f"{number:03}.txt").write_text(text)
    return {
        "model": model,
        "documents": str(documents),
        "instructions": "template",
        "chunk_min_tokens": 60,
        "chunk_max_tokens": 150,
        "turns": 2,
        "max_new_tokens": 60,
        "dtype": "fp32",
        "device": "cpu",
        "num_threads": 1,
    }


@pytest.fixture(scope="module")
def whole(values: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The examples file of one process that was left alone."""
    output = tmp_path_factory.mktemp("whole") / "examples.jsonl"
    generate.run_generate(GenerateConfig(**values, output=str(output), report=False))  # type: ignore[arg-type]
    return output.read_bytes()


class Array:
    """Submits the script from a folder of its own, as a user with `longpo` on PATH."""

    def __init__(self, cluster: Cluster, values: dict[str, object], folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.output = folder / "examples.jsonl"
        (folder / "generate.yaml").write_text(
            yaml.safe_dump({**values, "output": str(self.output)})
        )

    def submit(self) -> str:
        environment = rank_environment()
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        words = ("--array=0-1", str(SCRIPT), "generate.yaml")
        return self.cluster.submit(*words, cwd=self.folder, **{**environment, "PATH": path})

    def shard(self, index: int) -> Path:
        return self.folder / "examples.jsonl.partial" / f"shard-{index}-of-2.jsonl"

    def wait_until_begun(self, job: str, *indices: int) -> None:
        """Waits until these tasks have finished two documents."""
        begun = time.monotonic()
        while not all(
            self.shard(index).exists() and self.shard(index).read_bytes().count(b"\n") >= 2
            for index in indices
        ):
            states = self.cluster.states(job)
            assert "RUNNING" in states.values() or "PENDING" in states.values(), self.log(job)
            assert time.monotonic() - begun < 120, self.log(job)
            time.sleep(0.05)

    def log(self, job: str) -> str:
        logs = sorted(self.folder.glob(f"longpo-generate-{job}_*.log"))
        return "\n".join(f"{log.name}: {log.read_text()}" for log in logs)

    def restarts(self, job: str, index: int) -> int:
        text = self.cluster.command("scontrol", "show", "job", f"{job}_{index}")
        found = re.search(r"Restarts=(\d+)", text)
        assert found is not None, text
        return int(found[1])


def test_a_cancelled_array_goes_on_when_it_is_submitted_again(
    cluster: Cluster, values: dict[str, object], whole: bytes, tmp_path: Path
) -> None:
    array = Array(cluster, values, tmp_path)
    job = array.submit()
    array.wait_until_begun(job, 0, 1)
    cluster.command("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    # What was under way is finished and kept, and nobody starts it again.
    kept = [array.shard(index).read_bytes() for index in (0, 1)]
    assert all(lines.endswith(b"\n") for lines in kept)
    assert not array.output.exists(), array.log(job)
    assert "requeueing" not in array.log(job)

    again = array.submit()
    cluster.wait_for(again, "COMPLETED")
    assert array.output.read_bytes() == whole
    assert not array.shard(0).parent.exists()
    assert (tmp_path / "examples.report.html").exists()
    assert array.log(again).count("documents were done already") == 2, array.log(again)
    assert set(cluster.states(job).values()) == {"CANCELLED"}


@pytest.mark.parametrize("index", [0, 1])
def test_a_task_near_its_time_limit_requeues_itself_alone(
    cluster: Cluster, values: dict[str, object], whole: bytes, tmp_path: Path, index: int
) -> None:
    array = Array(cluster, values, tmp_path)
    job = array.submit()
    array.wait_until_begun(job, index)
    cluster.command("scancel", "--batch", "--signal=USR1", f"{job}_{index}")
    cluster.wait_for(job, "COMPLETED")
    assert [array.restarts(job, task) for task in (0, 1)] == [int(index == 0), int(index == 1)]
    assert array.output.read_bytes() == whole
    assert not array.shard(0).parent.exists()
    assert "stopped on request: requeueing" in array.log(job)
    assert "documents were done already" in array.log(job)
