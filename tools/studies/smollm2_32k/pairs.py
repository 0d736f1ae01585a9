"""Chooses the pairs that are trained on, and says what they look like."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_longpo.data.jsonl import replacing, write_packed_jsonl, write_whole
from megatron_longpo.data.text.examples import Example, ExampleFile, example_columns
from megatron_longpo.errors import UserError
from megatron_longpo.generation.questions.facts import holds_fact
from tools.studies.smollm2_32k.outlines import outline_of, restored_examples, write_outlines

NUM_SHOWN = 6


def choose_pairs(
    examples_path: Path,
    pairs_path: Path,
    *,
    number: int,
    keep_all: bool,
    seed: int,
    documents: Path | None = None,
    parent: str | None = None,
    writer: str | None = None,
) -> dict[str, Any]:
    """Writes up to `number` examples, gzipped, and beside them what they look like as JSON, and,
    with the file of `documents` that they were made of, their outline. `writer` is the run whose
    model wrote them, None for the base, and `parent` the digest of the pairs that it trained on.

    Turns whose rejected answer holds the fact too are left out, since they prefer nothing;
    `keep_all` keeps them. Examples with more turns come first, others by chance.
    """
    examples = list(ExampleFile(examples_path))
    answers = Counter[str]()
    kept: list[Example] = []
    for example in examples:
        facts = [tuple(fact) for fact in example.meta["facts"]]
        turns = list(zip(example.turns, facts, strict=True))
        answers["turns"] += len(turns)
        answers["chosen_right"] += sum(holds_fact(turn.chosen, fact) for turn, fact in turns)
        wrong = [not holds_fact(turn.rejected, fact) for turn, fact in turns]
        answers["rejected_wrong"] += sum(wrong)
        numbers = [number for number, is_wrong in enumerate(wrong) if is_wrong or keep_all]
        if numbers:
            kept.append(_with_turns(example, numbers))
    random.Random(seed).shuffle(kept)
    kept.sort(key=lambda example: -len(example.turns))
    chosen = kept[:number]
    if documents is not None:
        write_outlines(outline_of(pairs_path), chosen, documents)
    summary_path = examples_path.with_suffix(".summary.json")
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    described = {
        "digest": digest(chosen),
        "parent": parent,
        "writer": writer,
        "generated": {key: value for key, value in summary.items() if key != "put_aside"},
        "answers": dict(answers),
        "pairs": len(chosen),
        "turns": sum(len(example.turns) for example in chosen),
        "kinds": dict(Counter(kind for example in chosen for kind in example.meta["kinds"])),
        # Questions and answers alone: documents have their own licences.
        "shown": list(_shown(chosen[:NUM_SHOWN])),
    }
    write_whole(description_of(pairs_path), json.dumps(described, indent=1) + "\n")
    # Last: pairs are never there without what they are.
    write_packed_jsonl(pairs_path, map(example_columns, chosen))
    return described


def description_of(pairs_path: Path) -> Path:
    """Returns where the description of a file of pairs is."""
    return pairs_path.with_name(pairs_path.name.removesuffix(".jsonl.gz") + ".json")


def digest_in(folder: Path, iteration: int, *, writer: str | None = None) -> str | None:
    """Returns the digest of an iteration's pairs, from their description in a folder.

    None = there is none, or a model of other pairs wrote them, or another run than `writer`.
    """
    path = description_of(folder / f"pairs-{iteration}.jsonl.gz")
    if not path.exists():
        return None
    described = json.loads(path.read_text(encoding="utf-8"))
    if iteration > 1 and described.get("parent") != digest_in(folder, iteration - 1):
        return None
    if writer is not None and described.get("writer") != writer:
        return None
    return described.get("digest")


def restore_pairs(results: Path, pairs_path: Path, documents: Path) -> None:
    """Makes the pairs of the results again, from their outline and the documents.

    Raises:
        UserError: where there is no outline, or these are not the same documents.
    """
    outline = outline_of(results / pairs_path.name)
    description = description_of(results / pairs_path.name)
    for path in (outline, description):
        if not path.exists():
            raise UserError(f"--our-pairs: {path} is not there. Leave it out to make your own")
    examples = restored_examples(outline, documents)
    wanted = json.loads(description.read_text(encoding="utf-8"))["digest"]
    if digest(examples) != wanted:
        raise UserError(
            f"--our-pairs: {outline} gives other pairs than those of {description} ({wanted}). "
            "Take both from the same commit, or leave --our-pairs out"
        )
    for path in (outline, description):
        copy_whole(path, pairs_path.with_name(path.name))
    write_packed_jsonl(pairs_path, map(example_columns, examples))


def copy_whole(source: Path, target: Path) -> None:
    """Copies a small file, which appears when it is whole."""
    with replacing(target) as file:
        file.write(source.read_bytes())


def unpack(pairs_path: Path, target: Path) -> None:
    """Writes the pairs as plain JSONL, for `longpo tokenize`."""
    with gzip.open(pairs_path, "rb") as file:
        write_whole(target, file.read().decode())


def digest(examples: Sequence[Example]) -> str:
    """Returns the digest of what is trained on, wherever it was made."""
    made = [{**example_columns(example), "meta": None} for example in examples]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


def _with_turns(example: Example, numbers: Sequence[int]) -> Example:
    """Returns the example with only these turns; lists of `meta` with an item a turn follow."""
    meta = {
        key: [value[number] for number in numbers]
        if isinstance(value, list) and len(value) == len(example.turns)
        else value
        for key, value in example.meta.items()
    }
    return replace(example, turns=tuple(example.turns[number] for number in numbers), meta=meta)


def _shown(examples: Sequence[Example]) -> Iterator[dict[str, str]]:
    for example in examples:
        turn = example.turns[0]
        yield {
            "kind": example.meta["kinds"][0],
            "question": turn.question,
            "chosen": turn.chosen,
            "rejected": turn.rejected,
        }
