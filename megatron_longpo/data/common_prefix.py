"""The length of the common beginning of two sequences."""

from __future__ import annotations

import bisect

import numpy as np


def common_prefix_length(left: np.ndarray, right: np.ndarray) -> int:
    """Returns how many leading values two 1-D arrays share."""
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if different.size else length


def common_text_length(left: str, right: str) -> int:
    """Returns how many leading characters two texts share."""
    longest = min(len(left), len(right))
    if left[:longest] == right[:longest]:
        return longest
    # By bisection: slices compare fast.
    return bisect.bisect_left(
        range(1, longest + 1), True, key=lambda length: left[:length] != right[:length]
    )
