"""`longpo generate`: documents to preference examples, written by the model that learns from them.

Chosen answers are written from a chunk and a question, rejected ones from the whole document and
the same question. Every example is appended when it is done, so an interrupted run goes on where
it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from operator import length_hint
from pathlib import Path

from megatron_longpo.data.examples import ExampleFile, example_columns
from megatron_longpo.data.jsonl import dump_line, partial_path, refuse_existing
from megatron_longpo.data.progress import Dropped, format_counts, track
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends import TransformersBackend
from megatron_longpo.generation.config import GenerateConfig
from megatron_longpo.generation.documents import open_documents
from megatron_longpo.generation.prompts import read_instructions
from megatron_longpo.generation.writer import ExampleWriter, GenerateSummary


def run_generate(config: GenerateConfig) -> GenerateSummary:
    """Writes the examples file and prints what became of the documents."""
    _check(config)
    refuse_existing(config.output, overwrite=config.overwrite, key="output")
    documents = open_documents(config)
    instructions = None
    if config.instructions not in ("model", "template"):
        instructions = read_instructions(config.instructions)
    partial = partial_path(config.output)
    if config.overwrite:
        partial.unlink(missing_ok=True)
    fingerprint = _settings_fingerprint(config)
    done = _resume(partial, fingerprint)
    backend = TransformersBackend(
        config.model,
        dtype=config.dtype,
        device=config.device,
        num_threads=config.num_threads,
        chat_template=config.chat_template,
    )
    writer = ExampleWriter(backend, config, instructions, settings=fingerprint)
    summary = writer.summary
    started = time.monotonic()
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8", newline="\n") as file:
        for document in track(documents, description="generate", total=length_hint(documents)):
            summary.num_documents += 1
            if document.id in done:
                summary.num_examples += 1
                summary.num_resumed += 1
                summary.num_turns += done[document.id]
                continue
            try:
                example = writer.example(document)
            except Dropped as dropped:
                summary.dropped[str(dropped)] += 1
                continue
            summary.num_examples += 1
            summary.num_turns += len(example.turns)
            file.write(dump_line(example_columns(example)))
            file.flush()
        os.fsync(file.fileno())
    summary.seconds = time.monotonic() - started
    summary.dropped.update(documents.dropped)
    for reason, source in documents.first_dropped.items():
        number = documents.dropped[reason]
        print(f"warning: {number} x {reason}, for one {source}", file=sys.stderr)
    if summary.num_examples == 0:
        partial.unlink()
        raise UserError(
            f"documents ({config.documents}): gave no example (dropped: "
            f"{format_counts(summary.dropped)}); see chunk_min_tokens and chunk_max_tokens"
        )
    os.replace(partial, config.output)
    print(f"{config.output}: {summary}")
    return summary


# ---------------------------------------------------------------- settings and resuming


def _check(config: GenerateConfig) -> None:
    for key in (
        "turns",
        "max_new_tokens",
        "chunk_min_tokens",
        "chunk_max_tokens",
        "min_document_tokens",
        "max_document_tokens",
        "max_document_bytes",
        "max_prompt_tokens",
        "limit",
        "num_threads",
    ):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"{key} ({value}): must be at least 1")
    for branch in ("chosen", "rejected", "question"):
        temperature, top_p = (
            getattr(config, f"{branch}_{part}") for part in ("temperature", "top_p")
        )
        if not temperature >= 0:
            raise UserError(f"{branch}_temperature ({temperature}): must be 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise UserError(f"{branch}_top_p ({top_p}): must be above 0 and at most 1")
    if config.require_fact and config.instructions != "template":
        raise UserError("require_fact (true): only questions of instructions: template have facts")


def _settings_fingerprint(config: GenerateConfig) -> str:
    """A hash of all settings that change an example."""
    settings = dataclasses.asdict(config)
    for key in ("documents", "output", "limit", "overwrite", "num_threads"):
        del settings[key]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _resume(partial: Path, fingerprint: str) -> dict[str, int]:
    """Document ids with their turns in an unfinished file; a last line cut short is taken off."""
    if not partial.exists():
        return {}
    data = partial.read_bytes()
    complete = data.rfind(b"\n") + 1
    if complete < len(data):
        os.truncate(partial, complete)
    if complete == 0:
        return {}
    done = {}
    for example in ExampleFile(partial):
        if example.meta.get("settings") != fingerprint:
            raise UserError(
                f"{example.source}: was made with other settings; give --overwrite to begin anew "
                "or choose another output"
            )
        done[example.id] = len(example.turns)
    return done
