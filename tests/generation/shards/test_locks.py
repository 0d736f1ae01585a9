from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.generation import generate
from megatron_longpo.generation.shards.locks import hold
from tests.generation.scripted import Install, by_length, settings

HOLDER = """
import sys
import time
from pathlib import Path
from megatron_longpo.generation.shards.locks import hold
with hold(Path(sys.argv[1]), what="it"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_writers_on_one_shard(many_documents: str, tmp_path: Path, scripted: Install) -> None:
    lock = tmp_path / "examples.jsonl.partial" / "shard-1-of-2.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    scripted(by_length)
    config = settings("m", many_documents, tmp_path, shard="1/2")
    with pytest.raises(
        UserError,
        match=rf"shard 1/2 of .* is being written by process {holder.pid} on \S+; wait for it",
    ):
        generate.run_generate(config)
    # Nor may the folder be cleared under it.
    with pytest.raises(UserError, match=rf"is being written by process {holder.pid}"):
        generate.run_generate(settings("m", many_documents, tmp_path, overwrite=True))
    generate.run_generate(settings("m", many_documents, tmp_path, shard="0/2"))
    holder.kill()  # a lock ends with its process, however that ends
    holder.wait()
    assert generate.run_generate(config).num_examples == 7


def test_a_lock_whose_folder_was_removed_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with hold(folder / "a.lock", what="a"):
        shutil.rmtree(folder)
        with hold(folder / "a.lock", what="a"):
            assert (folder / "a.lock").exists()
