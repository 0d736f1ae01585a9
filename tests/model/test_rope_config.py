"""Every spelling of RoPE is read, overridden as asked, and refused where it is not supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.errors import UserError
from megatron_longpo.model.architectures import read_architecture
from tests.model.test_architectures import LLAMA, LLAMA3, write


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}, "rope_theta": 5e5},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_theta": None},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_theta": 1.0},
    ],
    ids=["transformers 4", "legacy type", "transformers 5", "theta inside wins"],
)
def test_reads_every_spelling_of_rope(tmp_path: Path, spelling: dict[str, Any]) -> None:
    config = {**LLAMA, **spelling}
    if config.get("rope_scaling", {}).get("rope_type", "") is None:
        del config["rope_scaling"]["rope_type"]
    rope = read_architecture(write(tmp_path, config)).rope
    assert rope.theta == 5e5
    assert rope.scaling == LLAMA3


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    folder = write(tmp_path, {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    kept = read_architecture(folder, rope_theta=1e7).rope
    assert kept.theta == 1e7 and kept.scaling == {"rope_type": "linear", "factor": 2.0}
    plain = read_architecture(
        folder, rope_scaling={"rope_type": "default"}, max_position_embeddings=131072
    ).rope
    assert plain.scaling is None and plain.max_position_embeddings == 131072
    assert plain.theta == 100000.0


def test_changed_positions_do_not_move_the_length_that_llama3_starts_from(tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
    folder = write(tmp_path, {**LLAMA, "rope_scaling": scaling})
    rope = read_architecture(folder, max_position_embeddings=131072).rope
    assert rope.scaling is not None
    assert rope.scaling["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4}},
            r"rope_type \(longrope\).*linear, llama3, yarn",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type yarn needs a number for factor"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": 1}},
            r"truncate \(1\) of rope_type yarn must be true or false",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": 0}},
            r"mscale \(0\) of rope_type yarn must be a number above 0",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a number for factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_refuses_rope_that_is_not_supported(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_architecture(write(tmp_path, {**LLAMA, **change}))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
