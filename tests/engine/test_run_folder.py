from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_longpo.config.train import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
    load_train_config,
    resolve,
)
from megatron_longpo.engine import run_folder
from megatron_longpo.errors import UserError


def config_in(folder: Path) -> TrainConfig:
    return resolve(
        TrainConfig(
            model=ModelConfig(hf_path="a", rope_scaling={"rope_type": "linear", "factor": 2}),
            data=DataConfig(path="rows.jsonl"),
            objective=ObjectiveConfig(beta=0.25),
            logging=LoggingConfig(dir=str(folder)),
        )
    )


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run_folder.check_is_new(config)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    run_folder.check_is_new(config)

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    message = r"checkpoint\.resume \(never\): .*{} is there from an earlier run; .* use auto"
    with pytest.raises(UserError, match=message.format(r"metrics\.jsonl")) as error:
        run_folder.check_is_new(config)
    assert "\n" not in str(error.value)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoints" / "iter_0000007").mkdir()
    with pytest.raises(UserError, match=message.format("checkpoints")):
        run_folder.check_is_new(config)


def test_the_written_config_can_be_run_again(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run")
    run_folder.write_config(config, {"data": "abc"})
    path = tmp_path / "run" / "config.yaml"
    contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert contents.pop("fingerprints") == {"data": "abc"}
    versions = contents.pop("versions")
    assert {"megatron_longpo", "python", "torch", "megatron-core"} <= set(versions)
    assert contents == run_folder.plain_config(config)
    assert contents["objective"]["beta"] == 0.25 and contents["reference"]["mode"] == "online"
    path.write_text(yaml.safe_dump(contents))
    assert load_train_config(["--config", str(path)]) == config


@pytest.mark.parametrize("key", ["logging.dir", "checkpoint.dir"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, key: str) -> None:
    config = config_in(tmp_path / "new" / "run")
    run_folder.check_writable(config)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "run")
    if key == "logging.dir":
        config = replace(config, logging=replace(config.logging, dir=below))
    else:
        config = replace(config, checkpoint=replace(config.checkpoint, dir=below))
    with pytest.raises(UserError, match=rf"{key} \(.*file/run\): .*file is a file") as error:
        run_folder.check_writable(config)
    assert "\n" not in str(error.value)


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The superuser, as whom containers run tests, may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=rf"logging\.dir \(.*\): {tmp_path} is not writable"):
        run_folder.check_writable(config_in(tmp_path / "run"))
