from __future__ import annotations

from typing import Any

from megatron_longpo.evaluation.suite_numbers import suite_numbers


def test_means_are_what_the_suite_says() -> None:
    def cell(task: str, group: str | None, value: float, samples: int) -> dict[str, Any]:
        return {"task": task, "group": group, "length": None, "value": value, "samples": samples}

    cells = [cell("x", "a", 1.0, 1), cell("y", "a", 0.0, 3), cell("z", "b", 0.5, 4)]
    for mean, expected in (("tasks", 0.5), ("groups", 0.5), ("samples", 3 / 8)):
        numbers = suite_numbers({"s": {"mean": mean, "cells": cells}})
        assert numbers["suite/s"] == expected
        assert numbers["suite/s/a"] == (0.25 if mean == "samples" else 0.5)
    cells[2]["value"] = 0.0
    assert suite_numbers({"s": {"mean": "groups", "cells": cells}})["suite/s"] == 0.25
