"""Splits of a data set: which files belong to which, and which one is read."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from megatron_longpo.errors import UserError

TRAIN_SPLITS = ("train",)
"""Read from a source with several splits if none is named."""
EVALUATION_SPLITS = ("validation", "test")
"""Read to evaluate: the first of these that exists, never the split to train on."""

KEYWORDS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in names of files and folders that `datasets` takes for a split."""
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*\..*")
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
_BORDER = "[-._ 0-9]"


def choose_split(
    splits: Collection[str], name: str, split: str | None, defaults: Sequence[str] = TRAIN_SPLITS
) -> str:
    """Returns `split`, or if that is None the only split or the first of `defaults` that exists.

    Args:
        splits: the splits that exist.
        name: path or hub id of the source, for messages.
        split: name of the wanted split.
        defaults: what to read if no split is named.
    """
    if split is None and len(splits) == 1:
        return next(iter(splits))
    for wanted in defaults if split is None else (split,):
        if wanted in splits:
            return wanted
    shown = f"splits {', '.join(splits)}" if len(splits) > 1 else f"split {', '.join(splits)}"
    wanted = " or ".join(defaults) if split is None else split
    raise UserError(
        f"{name}: has the {shown} and none is called {wanted}; give the folder of one split, or "
        "the name of one (data.split, data.eval_split; other commands: split)"
    )


def refuse_split(split: str | None, name: str) -> None:
    """Raises a `UserError` if a split is named for a source without splits."""
    if split is not None:
        raise UserError(f"split ({split}): {name} has no splits; leave split out")


def files_by_split(files: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, by the names that `datasets` reads.

    The first rule that fits any file decides, and files that do not fit it belong to no split:
    `data/NAME-00000-of-00001.parquet`, a keyword in the name of a folder, a keyword in the name of
    a file. If none fits, all files are `train`. A file with keywords of two splits is in both.

    Args:
        files: files below `folder`.
        folder: the data set's folder; names above it are not read.
    """
    paths = {file: file.relative_to(folder) for file in files}
    return (
        _sharded(paths, inside_data=os.path.basename(os.path.abspath(folder)) == "data")
        or _by_keyword({file: path.parts[:-1] for file, path in paths.items()}, may_end=True)
        or _by_keyword({file: path.parts[-1:] for file, path in paths.items()}, may_end=False)
        or {"train": list(files)}
    )


def _sharded(paths: Mapping[Path, Path], *, inside_data: bool) -> dict[str, list[Path]]:
    """Returns the splits of `data/NAME-00000-of-00001.parquet`; the folder may be `data` itself."""
    found: dict[str, list[Path]] = {}
    for file, path in paths.items():
        shard = _SHARD.fullmatch(path.name)
        if shard and path.parent == Path("." if inside_data else "data"):
            found.setdefault(shard["split"], []).append(file)
    # `datasets` refuses other names; here the next rule reads them.
    return found if all(_SPLIT_NAME.fullmatch(split) for split in found) else {}


def _by_keyword(names: Mapping[Path, Iterable[str]], *, may_end: bool) -> dict[str, list[Path]]:
    """Returns the splits whose keyword is a word of one of a file's names.

    Args:
        names: for each file the names to look at.
        may_end: whether the name may end with the keyword; file names have a suffix after it.
    """
    found: dict[str, list[Path]] = {}
    for split, words in KEYWORDS.items():
        rest = f"(?:{_BORDER}.*)?" if may_end else f"{_BORDER}.*"
        pattern = re.compile(f"(?:.*{_BORDER})?(?:{'|'.join(words)}){rest}", re.DOTALL)
        fitting = [file for file, parts in names.items() if any(map(pattern.fullmatch, parts))]
        if fitting:
            found[split] = fitting
    return found
