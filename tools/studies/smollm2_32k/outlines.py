"""Pairs without the documents they are about, small and free enough to be kept with the results.

Documents have their own licences and come from packages that others have too. What was planted in
them, the spans of the chunks, questions and answers are ours: with the same documents they give the
same pairs, on a machine that never generated.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.data.jsonl import write_packed_jsonl
from megatron_longpo.data.text.examples import Example, check_example, example_columns
from megatron_longpo.errors import UserError

Outline = dict[str, Any]
KEPT_META = ("kinds", "facts", "model")


def outline_of(pairs_path: Path) -> Path:
    """Where the outline of a file of pairs is."""
    return pairs_path.with_name(pairs_path.name.removesuffix(".jsonl.gz") + ".outline.jsonl.gz")


def write_outlines(path: Path, examples: Sequence[Example], documents: Path) -> None:
    """Writes the outline of the examples, or none where something else than lines was planted."""
    texts = list(_texts(documents))
    found = [outline(example, texts[_line(example) - 1]) for example in examples]
    path.unlink(missing_ok=True)
    if None in found:
        print(f"{path}: not written; a fact was planted within a line", flush=True)
    else:
        write_packed_jsonl(path, (one for one in found if one is not None))


def restored_examples(outlines: Path, documents: Path) -> list[Example]:
    """The examples of an outline.

    Raises:
        UserError: where a document is not the one that they were made of.
    """
    found = {_digest(text): (line, text) for line, text in enumerate(_texts(documents), start=1)}
    kept = list(_lines(outlines))
    missing = [one["id"] for one in kept if one["digest"] not in found]
    if missing:
        raise UserError(
            f"--our-pairs: {documents} lacks the documents of {len(missing)} of {len(kept)} pairs; "
            "its packages have other versions. Leave --our-pairs out to make pairs of your own"
        )
    examples = []
    for one in kept:
        line, text = found[one["digest"]]
        examples.append(restored(one, text, source=f"{documents}:{line}"))
    return examples


def outline(example: Example, text: str) -> Outline | None:
    """What an example holds beside the text of its document; None where its document is not that
    text with further lines in it."""
    before = text.split("\n")
    planted: list[tuple[int, list[str]]] = []
    at = 0
    for line in example.document.split("\n"):
        if at < len(before) and line == before[at]:
            at += 1
        elif planted and planted[-1][0] == at:
            planted[-1][1].append(line)
        else:
            planted.append((at, [line]))
    if at < len(before):
        return None
    turns = example_columns(example)["turns"]
    return {
        "id": example.id,
        "digest": _digest(text),
        "planted": planted,
        "turns": [{key: value for key, value in turn.items() if key != "chunk"} for turn in turns],
        "meta": {key: example.meta[key] for key in KEPT_META if key in example.meta},
    }


def restored(kept: Mapping[str, Any], text: str, *, source: str) -> Example:
    """The example of an outline; its chunks are what their spans say."""
    lines = text.split("\n")
    for start, planted in reversed(kept["planted"]):
        lines[start:start] = planted
    document = "\n".join(lines)
    value = {
        "id": kept["id"],
        "document": document,
        "turns": [
            {**turn, "chunk": document[slice(*turn["chunk_span"])]} for turn in kept["turns"]
        ],
        "meta": {"source": source, **kept["meta"]},
    }
    return check_example(value, source=source)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _line(example: Example) -> int:
    """The document's line in the file that the example was made of."""
    return int(str(example.meta["source"]).rpartition(":")[2])


def _texts(documents: Path) -> Iterator[str]:
    return (line["text"] for line in _lines(documents))


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
