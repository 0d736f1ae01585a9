"""The page of the study: tables and plots out of the results that there are, as Markdown."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.data.jsonl import write_whole
from megatron_longpo.evaluation.figures import tokens
from megatron_longpo.evaluation.output import FILE_NAME
from tools.studies.smollm2_32k.commands import Commands
from tools.studies.smollm2_32k.outlines import outline_of
from tools.studies.smollm2_32k.pairs import copy_whole, description_of, digest_in
from tools.studies.smollm2_32k.plan import ITERATIONS, Run
from tools.studies.smollm2_32k.plots import Groups, draw_all, ended, gained, retrieval
from tools.studies.smollm2_32k.results import Result, read_results
from tools.studies.smollm2_32k.ruler import read_ruler

EARLIER = (
    # Seen on an H100 before this study, with plain PyTorch, AdamW and 175 documents.
    ("base, theta 1e5", (None, None, 0.95, 0.50, 0.00, 0.00), 0.0),
    ("base, theta 4e5", (None, None, 0.70, 0.35, 0.30, 0.00), 0.068),
    ("base, theta 1e6", (None, None, 0.40, 0.15, 0.05, 0.10), 0.169),
    ("NLL at 32K, 40 steps", (None, None, 0.90, 0.60, 0.45, 0.30), 0.097),
    ("NLL at 32K, 160 steps", (None, None, 1.00, 0.80, 0.75, 0.45), 0.145),
)
"""Retrieval at 1K to 32K and short KL: the figures to beat."""
PLAIN_NLL = "NLL of the chosen row"
EQUAL_RETRIEVAL = 0.05
"""How much less counts as equal: the standard error of a share, of 100 questions."""
LEAST_RETRIEVAL = {16384: 0.90, 32768: 0.75}
"""What LongPO is to reach."""
SHORT_TOKENS = 4096
"""Up to here retrieval is not to fall below the base's."""
MOST_EVALUATION_SHARE = 0.03
EVALUATION_INTERVAL = 50


def write_page(results: Path, output: Path, keep: Path, runs: Sequence[Run]) -> None:
    """Writes README.md and its plots into the folder of results, where there are any."""
    _keep_descriptions(keep, results)
    by_name = {result.name: result for result in read_results(results)}
    found = {
        run.name: result
        for run in runs
        if (result := by_name.get(run.name)) is not None
        and result.is_by_settings_of(run)
        and _is_of_the_pairs(result, results)
    }
    if not found:
        return
    measured = [run for run in runs if run.name in found and found[run.name].numbers]
    compared = _grouped([run for run in measured if run.is_compared], found)
    others = _grouped([run for run in measured if not run.is_compared], found)
    plots = draw_all(compared, results) if compared else []
    if compared:
        plots += _compare(compared, results, output)
    leads = dict.fromkeys(run.title for run in runs if run.is_compared and _is_longpo(run))
    parts = [
        "# Results",
        "Written by `python -m tools.studies.smollm2_32k.study`; [what it is](../README.md).",
        _about(list(found.values())),
        "## Compared",
        _table(compared),
        *_earlier(compared),
        *(f"![{name}]({name})" for name in plots),
        *_targets(compared, others, list(leads)),
        *_ruler(results, [run.title for run in runs]),
        *(["## Other settings", _table(others)] if others else []),
        *_evaluation_cost(list(found.values())),
        *_pairs(results),
    ]
    write_whole(results / "README.md", "\n\n".join(parts) + "\n")
    print(results / "README.md")


def _grouped(runs: Sequence[Run], found: Mapping[str, Result]) -> Groups:
    """Results by title, in the order of the plan."""
    groups: dict[str, list[Result]] = {}
    for run in runs:
        groups.setdefault(run.title, []).append(found[run.name])
    return groups


def _about(results: Sequence[Result]) -> str:
    devices = sorted({result.device for result in results})
    seeds = sorted({result.seed for result in results if result.curves})
    seconds = sum(sum(result.seconds.values()) for result in results)
    return (
        f"{len(results)} runs on {', '.join(devices)}, {seconds / 60:.0f} minutes together; seeds "
        f"{', '.join(map(str, seeds)) or 'none'}. Of several seeds: mean ± standard deviation."
    )


def _table(groups: Groups) -> str:
    """A line a group: retrieval, answers ended, NLL at the longest positions, retention."""
    lengths = sorted({length for found in groups.values() for length in retrieval(found[0])})
    buckets = [key for found in groups.values() for key in found[0].numbers if key[:4] == "nll/"]
    last = list(dict.fromkeys(buckets))[-1:]
    heads = [*map(tokens, lengths), f"ended to {tokens(SHORT_TOKENS)}", "ended"]
    heads += [*(f"NLL at {key[4:]}" for key in last), "short KL", "agreement"]
    lines = [_line(["", "seeds", "questions", *heads]), "|---|" + "---:|" * (len(heads) + 2)]
    for title, found in groups.items():
        rows = [
            [
                *(result.numbers.get(f"retrieval/{length}") for length in lengths),
                *(
                    ended(result, longest=longest)
                    for longest in (SHORT_TOKENS, max(lengths, default=0))
                ),
                *(result.numbers.get(key) for key in last),
                result.numbers.get("retention/kl"),
                result.numbers.get("retention/agreement"),
            ]
            for result in found
        ]
        cells = [
            _spread(values, 3 if head == "short KL" else 2)
            for head, *values in zip(heads, *rows, strict=True)
        ]
        lines.append(_line([title, str(len(found)), _num_questions(found), *cells]))
    return "\n".join(lines)


def _num_questions(found: Sequence[Result]) -> str:
    """How many were asked a length, in each run."""
    numbers = set()
    for result in found:
        by_length = Counter[int]()
        for cell in result.record["retrieval"]:
            by_length[cell["length"]] += cell["samples"]
        numbers |= set(by_length.values())
    return ", ".join(map(str, sorted(numbers)))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float | None], digits: int) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    mean = statistics.mean(numbers)
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def _earlier(compared: Groups) -> Iterator[str]:
    lengths = [1024 << power for power in range(6)]
    if not any(lengths == list(retrieval(found[0])) for found in compared.values()):
        return
    lines = [_line(["", *map(tokens, lengths), "short KL"]), "|---|" + "---:|" * 7]
    for title, values, kl in EARLIER:
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append(_line([title, *cells, f"{kl:.3f}"]))
    yield (
        "The figures to beat, seen before with plain PyTorch on one H100 (175 documents of 34,000 "
        "tokens, AdamW, lr 3e-5, 20 questions of the same kind a length):"
    )
    yield "\n".join(lines)


def _is_longpo(run: Run) -> bool:
    """Whether all of LongPO's loss is there, and its first iteration."""
    if run.method is None or run.iteration > 1:
        return False
    options = run.method.options
    return (
        options["objective.name"] == "longpo"
        and "objective.nll_weight" not in options
        and "reference.context" not in options
    )


def _targets(compared: Groups, others: Groups, leads: Sequence[str]) -> Iterator[str]:
    """Whether LongPO does what it is to do, where its lengths were measured."""
    leads = [lead for lead in leads if lead in compared and "base" in compared]
    if leads:
        yield "## Targets"
    for lead in leads:
        yield f"{lead}:"
        lines = _target_lines(compared[lead], compared["base"][0], {**compared, **others})
        yield "\n".join([_line(["target", "seen", ""]), "|---|---:|---|", *lines])


def _target_lines(found: Sequence[Result], base: Result, groups: Groups) -> list[str]:
    lines = []
    for length, least in LEAST_RETRIEVAL.items():
        values = [value for r in found if (value := retrieval(r).get(length)) is not None]
        if values:
            mean = statistics.mean(values)
            what = f"retrieval at {tokens(length)} at least {least:.2f}"
            lines.append(_least_line(what, mean, least))
    for length, before in retrieval(base).items():
        if length <= SHORT_TOKENS:
            mean = statistics.mean(retrieval(result)[length] for result in found)
            what = f"retrieval at {tokens(length)} not below the base's {before:.2f}"
            lines.append(_least_line(what, mean, before))
    plain = {title: group for title, group in groups.items() if title.startswith(PLAIN_NLL)}
    if plain:
        lines.append(_line(_kl_target(found, plain)))
    return lines


def _least_line(what: str, seen: float, least: float) -> str:
    """With a third digit where two would hide a miss."""
    is_met = seen >= least
    digits = 3 if not is_met and round(seen, 2) >= round(least, 2) else 2
    return _line([what, f"{seen:.{digits}f}", "met" if is_met else "missed"])


def _kl_target(found: Sequence[Result], plain: Groups) -> list[str]:
    """Short KL beside that of plain NLL where it finds as much, at the two longest lengths; else
    beside the least of those that find about the most that plain NLL does."""
    ours = _mean_kl(found)
    most = max(_mean_retrieval(group) for group in plain.values())
    least = _mean_retrieval(found) - EQUAL_RETRIEVAL
    has_equal = most >= least
    least = least if has_equal else most - EQUAL_RETRIEVAL
    near = {title: group for title, group in plain.items() if _mean_retrieval(group) >= least}
    title, best = min(near.items(), key=lambda item: _mean_kl(item[1]))
    theirs = _mean_kl(best)
    what = f"short KL below plain NLL's at equal retrieval: {theirs:.3f} ({title})"
    if not has_equal:
        what += f", which finds only {_mean_retrieval(best):.2f} at the two longest"
    failed = "missed" if has_equal else "without an equal"
    return [what, f"{ours:.3f}", "met" if ours < theirs else failed]


def _mean_retrieval(group: Sequence[Result]) -> float:
    return statistics.mean(gained(result) for result in group)


def _mean_kl(group: Sequence[Result]) -> float:
    return statistics.mean(result.numbers["retention/kl"] for result in group)


def _ruler(results: Path, titles: Sequence[str]) -> Iterator[str]:
    """RULER by length, and by task, in the order of the titles."""
    by_title = read_ruler(results, pairs=digest_in(results, 1))
    found = {title: by_title[title] for title in titles if title in by_title}
    if not found:
        return
    keys = list(dict.fromkeys(key for numbers in found.values() for key in numbers))
    parts = [key.split("/") for key in keys]
    lengths = [int(part[2]) for part in parts if len(part) == 3 and part[2].isdecimal()]
    tasks = [part[2] for part in parts if len(part) == 3 and not part[2].isdecimal()]
    yield "## RULER"
    yield "Mean over tasks, by length; written answers, `ruler.yaml`."
    lines = [_line(["", *map(tokens, lengths)]), "|---|" + "---:|" * len(lengths)]
    for title, numbers in found.items():
        cells = [f"{numbers[f'suite/ruler/{length}']:.3f}" for length in lengths]
        lines.append(_line([title, *cells]))
    yield "\n".join(lines)
    yield "By task, mean over lengths:"
    lines = [_line(["task", *found]), "|---|" + "---:|" * len(found)]
    for task in tasks:
        cells = [f"{numbers[f'suite/ruler/{task}']:.2f}" for numbers in found.values()]
        lines.append(_line([task, *cells]))
    yield "\n".join(lines)


def _evaluation_cost(results: Sequence[Result]) -> Iterator[str]:
    """What evaluations in training take beside the steps between them."""
    shares = {}
    lines = []
    for result in results:
        # The first one of a run pays for kernels that are used for the first time.
        times = [row["eval/time_s"] for row in result.evaluations[1:] if "eval/time_s" in row]
        if times and result.seconds_per_step:
            mean = statistics.mean(times)
            shares[result.name] = mean / (EVALUATION_INTERVAL * result.seconds_per_step)
            cells = [f"{result.seconds_per_step:.3f} s", f"{mean:.2f} s"]
            verdict = "met" if shares[result.name] < MOST_EVALUATION_SHARE else "missed"
            lines.append(_line([result.name, *cells, f"{shares[result.name]:.1%}", verdict]))
    if lines:
        yield "## What evaluation in training costs"
        num_below = sum(share < MOST_EVALUATION_SHARE for share in shares.values())
        yield (
            f"An evaluation beside {EVALUATION_INTERVAL} steps: "
            f"{statistics.median(shares.values()):.1%} in the median of {len(shares)} runs, below "
            f"{MOST_EVALUATION_SHARE:.0%} in {num_below}. Runs that are on a GPU together slow "
            "each other down, in their steps and in evaluations."
        )
        target = f"below {MOST_EVALUATION_SHARE:.0%}"
        heads = ["run", "step", "evaluation", f"share, every {EVALUATION_INTERVAL} steps", target]
        yield "\n".join([_line(heads), "|---|---:|---:|---:|---|", *lines])
    unobserved = [result for result in results if result.curves and not result.evaluations]
    for result in unobserved:
        yield f"{result.name}: {result.seconds_per_step:.3f} s a step without evaluations."


def _keep_descriptions(keep: Path, results: Path) -> None:
    """What pairs look like, and their outlines, stay with the results, which are committed."""
    for path in sorted(keep.glob("pairs-*.jsonl.gz")):
        described, outline = description_of(path), outline_of(path)
        if not described.exists():
            continue
        results.mkdir(parents=True, exist_ok=True)
        # An outline of other pairs would not belong to the description.
        (results / outline.name).unlink(missing_ok=True)
        for kept in (outline, described):
            if kept.exists():
                copy_whole(kept, results / kept.name)


def _is_of_the_pairs(result: Result, results: Path) -> bool:
    """Whether a result is of the pairs that are described, and not of earlier ones."""
    if result.pairs is None:
        return not result.curves
    return result.pairs == digest_in(results, result.iteration)


def _pairs(results: Path) -> Iterator[str]:
    """What the rows look like."""
    for iteration in ITERATIONS:
        if digest_in(results, iteration) is None:
            continue
        path = description_of(results / f"pairs-{iteration}.jsonl.gz")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        answers, generated = found["answers"], found["generated"]
        yield f"## Pairs of iteration {iteration}"
        kinds = ", ".join(f"{kind} {number}" for kind, number in found["kinds"].items())
        yield (
            f"{generated['num_documents']} documents gave {generated['num_examples']} examples "
            f"with {answers['turns']} turns; in {answers['rejected_wrong']} of these the rejected "
            f"answer lacks the fact. Trained on: {found['pairs']} rows with {found['turns']} "
            f"turns, {kinds}."
        )
        dropped = generated["dropped"].items()
        yield "Dropped: " + ", ".join(f"{reason} {number}" for reason, number in dropped) + "."
        lines = [_line(["question", "chosen", "rejected"]), "|---|---|---|"]
        for one in found["shown"]:
            lines.append(_line([_cell(one[key]) for key in ("question", "chosen", "rejected")]))
        yield "\n".join(lines)


def _cell(text: str) -> str:
    """A text in a table: on one line, without what Markdown would take for its own."""
    short = " ".join(text.split())
    short = short if len(short) <= 200 else short[:200] + " ..."
    return "".join(f"\\{mark}" if mark in "\\|`*_<>[]" else mark for mark in short)


def _compare(compared: Groups, results: Path, output: Path) -> list[str]:
    """`longpo evaluate --compare` of the first seed's runs; returns the plots taken from it."""
    folders = []
    for found in compared.values():
        folder = output / "compared" / found[0].name
        folder.mkdir(parents=True, exist_ok=True)
        contents = {"results": found[0].record, "settings": {}}
        write_whole(folder / FILE_NAME, json.dumps(contents))
        folders.append(folder)
    target = output / "comparison"
    commands = Commands(output / "logs", minutes=None)
    commands.longpo("compare", "evaluate", "--compare", *folders, "--output", target)
    names = ["retrieval_heatmap.png", "nll_by_position.png"]
    for name in names:
        (results / name).write_bytes((target / name).read_bytes())
    return names
