"""`longpo convert verify`: checks that a model survives the way to Megatron and back.

The source is imported and exported into a temporary folder. Then weights, config, tokenizer and
chat template of the export are compared with the source's. The logits of our model, loaded from the
import, are compared with those of transformers on the source.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoints_convert.hf_folder import local_hf_folder
from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.hf_weights import HfWeights
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.torch_dist import find_iteration_folder
from checkpoints_convert.verify_files import compare_configs, compare_shapes, compare_weights
from checkpoints_convert.verify_logits import compare_logits
from checkpoints_convert.verify_tokenizer import (
    compare_chat_templates,
    compare_tokenizers,
    open_tokenizer,
    read_texts,
    token_rows,
)
from megatron_longpo.config.convert import ExportConfig, ImportConfig, VerifyConfig
from megatron_longpo.errors import CheckFailed, UserError
from megatron_longpo.model.architectures import read_architecture
from megatron_longpo.model.spec import DTYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison."""

    name: str
    passed: bool | None
    """None = not compared: there was nothing to compare, or the user switched it off."""
    detail: str
    """What was compared, or the first difference."""


def run_verify(config: VerifyConfig) -> None:
    """Verifies a model and prints what was compared.

    Raises:
        CheckFailed: if something differs.
        UserError: if a folder cannot be read.
    """
    checks = verify(config)
    failed = [check for check in checks if check.passed is False]
    if config.json:
        report = {
            "source": config.source,
            "export": config.export,
            "passed": not failed,
            "checks": [asdict(check) for check in checks],
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _show(config, checks)
    if failed:
        raise CheckFailed(f"{failed[0].name}: {failed[0].detail}")


def verify(config: VerifyConfig) -> list[Check]:
    """Makes the round trip in a temporary folder and does all comparisons, even if some fail."""
    source = local_hf_folder(config.source)
    model = source if config.export is None else local_hf_folder(config.export)
    arch = read_architecture(model)
    weights = HfWeights(model)
    weights.check(arch)
    texts = read_texts(config.text)
    tokenizer = open_tokenizer(source)
    rows = token_rows(texts, tokenizer, arch, max_tokens=config.max_tokens)
    dtype = None if config.dtype is None else DTYPES[config.dtype]
    checks: list[Check] = []

    def check(name: str, compare: Callable[[], str]) -> None:
        try:
            checks.append(Check(name=name, passed=True, detail=compare()))
        except CheckFailed as difference:
            checks.append(Check(name=name, passed=False, detail=str(difference)))

    def skip(name: str, why: str) -> None:
        checks.append(Check(name=name, passed=None, detail=why))

    with _work_folder(config.work_dir, weights) as folder:
        megatron, exported = str(folder / "megatron"), str(folder / "hf")
        import_checkpoint(ImportConfig(source=model, destination=megatron, dtype=config.dtype))
        export_checkpoint(ExportConfig(source=megatron, destination=exported))
        check("weights", lambda: compare_weights(weights, HfWeights(exported), arch, dtype=dtype))
        check("config", lambda: compare_configs(model, exported))
        if tokenizer is None:
            skip("tokenizer", "the source has none")
            skip("chat template", "the source has none")
        else:
            # With `export`, this compares the trained model with the one before training.
            other = open_tokenizer(exported)
            check("tokenizer", lambda: compare_tokenizers(tokenizer, other, texts))
            if tokenizer.chat_template is None:
                skip("chat template", "the source has none")
            else:
                check("chat template", lambda: compare_chat_templates(tokenizer, other))
        if config.export is not None:
            check("trained from source", lambda: compare_shapes(HfWeights(source), weights, arch))
            check("trained config", lambda: compare_configs(source, model, trained=True))
        if config.logits:
            iteration = find_iteration_folder(megatron)
            check(
                "logits",
                lambda: compare_logits(
                    model, iteration, arch, rows, tolerance=config.tolerance, folder=folder
                ),
            )
        else:
            skip("logits", "not asked for")
    return checks


@contextmanager
def _work_folder(parent: str | None, weights: HfWeights) -> Iterator[Path]:
    """Makes a temporary folder on a disk with room for the model twice."""
    root = Path(tempfile.gettempdir() if parent is None else parent).expanduser()
    if not root.is_dir():
        raise UserError(f"work_dir ({root}): no such folder; make it first")
    needed, free = 2 * weights.num_bytes, shutil.disk_usage(root).free
    if free < needed:
        raise UserError(
            f"work_dir ({root}): {free / 1e9:.1f} GB are free and the round trip takes "
            f"{needed / 1e9:.1f} GB; give another --work_dir"
        )
    with tempfile.TemporaryDirectory(prefix="longpo-verify-", dir=root) as folder:
        yield Path(folder)


def _show(config: VerifyConfig, checks: list[Check]) -> None:
    words = {True: "[green]same[/]", False: "[bold red]DIFFERENT[/]", None: "skipped"}
    title = config.source if config.export is None else f"{config.export}, from {config.source}"
    table = Table(title=title, title_justify="left")
    for heading in ("", "", "what was compared"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(check.name, words[check.passed], check.detail)
    Console(highlight=False).print(table)
