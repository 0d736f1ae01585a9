"""Makers of RULER's samples: lm-evaluation-harness's generators, without access to the web."""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from megatron_longpo.errors import UserError
from megatron_longpo.evaluation.harness.ruler_files import FILES, find_file, read_file, read_json

RulerSample = dict[str, Any]
Generate = Callable[[int, int], list[RulerSample]]
"""Makes samples from the most tokens of a sample (without template and answer) and a number."""


def _niah(
    *,
    tokens: Any,
    files: Path,
    length: int,
    haystack: str,
    keys: str,
    values: str,
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Generate:
    niah = _prepare_niah()
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    if haystack == "essay":
        text = read_file(files, "essays")["text"]
        hay: Any = re.sub(r"\s+", " ", text).split(" ")
        splitter = _sentences(str(files))
        niah.cached_sent_tokenize = splitter
    else:
        hay = niah.get_haystack(type_haystack=haystack)

    def generate(most: int, samples: int) -> list[RulerSample]:
        try:
            rows: list[RulerSample] = niah.generate_samples(
                hay,
                tokens,
                max_seq_length=most,
                type_haystack=haystack,
                type_needle_k=keys,
                type_needle_v=values,
                template=TEMPLATE,
                num_samples=samples,
                num_needle_k=num_keys,
                num_needle_v=num_values,
                num_needle_q=num_queries,
            )
        except ValueError as error:
            raise _too_short(length, "niah") from error
        if len(rows) < samples:
            raise _too_short(length, "niah")
        return rows

    return generate


def _vt(*, tokens: Any, files: Path, length: int) -> Generate:
    from lm_eval.tasks.ruler import vt_utils

    def generate(most: int, samples: int) -> list[RulerSample]:
        make = partial(vt_utils.sys_vartrack_w_noise_random, tokens)
        # The generator would search for a fitting sample forever.
        room = _size(tokens, lambda: vt_utils.generate_input_output(10, 1, 4)[0]) + 30
        least = _size(tokens, lambda: vt_utils.generate_input_output(5, 1, 4, is_icl=True)[0]) + 60
        if room + max(least, 500) > most or least > 500:
            raise _too_short(length, "vt")
        (example,) = make(num_samples=1, max_seq_length=500, incremental=5)
        rows: list[RulerSample] = make(
            num_samples=samples, max_seq_length=most, icl_example=example
        )
        return rows

    return generate


def _cwe(*, tokens: Any, files: Path, length: int) -> Generate:
    from lm_eval.tasks.ruler import cwe_utils

    def generate(most: int, samples: int) -> list[RulerSample]:
        cwe_utils.RNG.seed(random.getrandbits(32))
        texts = cwe_utils.generate_input_output(10, most)[:2]
        if _size(tokens, lambda: "\n".join(texts)) + 120 > most:
            raise _too_short(length, "cwe")
        rows: list[RulerSample] = cwe_utils.sys_word_pair_random(samples, most, tokens)
        for row in rows:
            row["input"] = f"{row.pop('input_example')}\n{row['input']}"
        return rows

    return generate


def _fwe(*, tokens: Any, files: Path, length: int) -> Generate:
    from lm_eval.tasks.ruler import fwe_utils

    # It fills the length without the answer, and needs enough words for frequencies to differ.
    def generate(most: int, samples: int) -> list[RulerSample]:
        if most - 50 < 500:
            raise _too_short(length, "fwe")
        rows: list[RulerSample] = fwe_utils.sys_kwext(tokens, most - 50, samples)
        return rows

    return generate


def _qa(*, tokens: Any, files: Path, length: int, questions: str) -> Generate:
    from lm_eval.tasks.ruler import qa_utils

    qa_utils.download_json = read_json  # the original downloads
    read = qa_utils.read_squad if questions == "squad" else qa_utils.read_hotpotqa
    asked, documents = read(str(find_file(files, questions)))

    def generate(most: int, samples: int) -> list[RulerSample]:
        if samples > len(asked):
            raise UserError(
                f"harness.samples ({samples}): {FILES[questions]} has {len(asked)} questions; set "
                "at most that"
            )
        # Questions whose documents do not fit are skipped, so more than `samples` are tried.
        extra = min(len(asked), samples + samples // 2 + 10)
        # RULER's step is for 4K and more; it would leave shorter lengths half empty.
        step = 10 if length >= 4096 else 1
        try:
            rows: list[RulerSample] = qa_utils.generate_samples(
                tokens, documents, asked, most, num_samples=extra, incremental=step
            )
        except ValueError as error:
            raise _too_short(length, questions) from error
        if len(rows) < samples:
            raise _too_short(length, questions)
        return rows[:samples]

    return generate


MAKERS: dict[str, Callable[..., Generate]] = {
    "niah": _niah,
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
    "qa": _qa,
}


def _too_short(length: int, task: str) -> UserError:
    return UserError(f"harness.lengths ({length}): too short for RULER's task {task}; set more")


def _size(tokens: Any, text: Callable[[], str]) -> int:
    return len(tokens(text()).input_ids)


@cache
def _prepare_niah() -> Any:
    """Imports lm-eval's module without its download of NLTK's sentence splitter."""
    import nltk

    download, nltk.download = nltk.download, lambda *_, **__: True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    finally:
        nltk.download = download


@cache
def _sentences(files: str) -> Callable[[str], list[str]]:
    """Returns a Punkt splitter trained on the essays themselves: NLTK's must be downloaded.

    It only decides between which sentences needles may be inserted.
    """
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    splitter = PunktSentenceTokenizer(read_file(Path(files), "essays")["text"])
    return cache(lambda text: splitter.tokenize(text))
