"""A tiny model with a tokenizer of words, and a few rows of every suite, in the suites' formats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_longpo.evaluation.haystack import filler_text
from tools.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, make_tiny_model

VOCABULARY = 1500
WORDS = [
    *("harbour", "ledger", "barrel", "window", "candle"),
    *("letter", "garden", "market", "river", "engine"),
]
PLACES = ["north", "south", "east", "west", "upper", "lower", "old", "new", "great", "small"]


def make_model(folder: Path, *, seed: int = 0) -> str:
    """Random weights; the tokenizer's tokens are words and pieces of them, as real ones' are."""
    path = make_tiny_model("llama", folder, seed=seed, vocab_size=VOCABULARY, max_positions=4096)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    essays = " ".join(essay(seed) for seed in range(3))
    repeated = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back. "
    )
    tokenizer.train_from_iterator([essays, repeated * 20, " ".join(WORDS * 20)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[2],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return path


def essay(seed: int, sentences: int = 120) -> str:
    rng = random.Random(seed)
    lines = [
        f"The {rng.choice(PLACES)} {rng.choice(WORDS)} of Dr. {rng.choice(WORDS).title()} holds "
        f"{rng.randint(2, 99)} things, e.g. a {rng.choice(WORDS)}."
        for _ in range(sentences)
    ]
    return " ".join(lines) + " " + filler_text(seed=seed + 1)[:2000]


def write_data(folder: Path) -> Path:
    """`harness.data`, for every suite that has local files."""
    _write_ruler(folder / "ruler")
    book = essay(9, sentences=1500)
    for split, extra in {
        "longbook_sum_en": {"answer": ["It is about a harbour."], "options": [""]},
        "longbook_qa_en": {"answer": ["harbour"], "options": [""]},
        "longbook_choice_en": {"answer": ["ledger"], "options": WORDS[:4]},
    }.items():
        rows = [{"id": n, "context": book, "input": "What is it?", **extra} for n in range(2)]
        _jsonl(folder / "xinrongzhang2022__InfiniteBench" / f"{split}.jsonl", rows)
    asked = {
        "context": book,
        "question": "What is it?",
        "answers": ["harbour"],
        "all_classes": None,
    }
    for name in ("narrativeqa", "lcc"):
        rows = [{**asked, "input": "", "length": 1}] * 2
        _jsonl(folder / "Xnhyacinth__LongBench" / name / "test.jsonl", rows)
    for subject in ("anatomy", "marketing"):
        rows = [
            {"question": f"What is {word}?", "choices": WORDS[:4], "answer": n % 4}
            for n, word in enumerate(WORDS)
        ]
        place = folder / "cais__mmlu" / subject
        _jsonl(place / "dev.jsonl", rows[:5])
        _jsonl(place / "test.jsonl", rows[5:])
    rows = [
        {
            "question": f"Where is the {word}?",
            "choices": {"text": [f"in the {place}" for place in PLACES[:3]], "label": list("ABC")},
            "answerKey": "ABC"[n % 3],
        }
        for n, word in enumerate(WORDS * 3)
    ]
    for split, part in (("train", rows[:27]), ("test", rows[27:]), ("validation", rows[:2])):
        _jsonl(folder / "allenai__ai2_arc" / "ARC-Challenge" / f"{split}.jsonl", part)
    rows = [
        {
            "activity_label": "Sailing",
            "ctx_a": f"A {word} is seen.",
            "ctx_b": "then it",
            "endings": [f"goes {place}." for place in PLACES[:4]],
            "label": str(n % 4),
        }
        for n, word in enumerate(WORDS * 2)
    ]
    for split, part in (("train", rows[:12]), ("validation", rows[12:16])):
        _jsonl(folder / "Rowan__hellaswag" / f"{split}.jsonl", part)
    rows = [
        {
            "sentence": f"The {word} did not fit the door because the _ was too {place}.",
            "option1": word,
            "option2": "door",
            "answer": str(1 + n % 2),
        }
        for n, (word, place) in enumerate(zip(WORDS, PLACES, strict=True))
    ]
    for split, part in (("train", rows[:6]), ("validation", rows[6:])):
        _jsonl(folder / "allenai__winogrande" / f"{split}.jsonl", part)
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write of a ledger.", "Shorter."]},
        {
            "question_id": 111,
            "category": "math",
            "turns": ["What is 3 + 4?", "And twice that?"],
            "reference": ["7", "14"],
        },
    ]
    _jsonl(folder / "mt_bench" / "questions.jsonl", questions)
    long = [{"idx": 1, "prompt": f"{book}\n\nWhat is it?", "query": "What is it?", "answer": "A."}]
    _jsonl(folder / "longbench_chat" / "questions.jsonl", long)
    return folder


def _write_ruler(folder: Path) -> None:
    folder.mkdir(parents=True)
    text = "\n".join(essay(seed) for seed in range(12))
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    articles = []
    for title in WORDS:
        paragraphs = [
            {
                "context": f"In the {place} there is a {title}. " + essay(n, sentences=3)[:200],
                "qas": [
                    {
                        "question": f"Where is the {title} number {n}?",
                        "answers": [{"text": place}, {"text": f"the {place}"}],
                        "is_impossible": n == 3,
                    }
                ],
            }
            for n, place in enumerate(PLACES)
        ]
        articles.append({"title": title, "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hops = [
        {
            "question": f"Is the {word} in the {place}?",
            "answer": "yes",
            "context": [[f"{word} {n}", [f"A {word}.", f" It is {place}."]] for n in range(3)],
        }
        for word in WORDS
        for place in PLACES
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hops))


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
