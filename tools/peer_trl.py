"""TRL's side of tools/bench_peers.py: its DPOTrainer at the best settings that a machine allows.

    python -m tools.peer_trl case.json result.json

Tried, each with the best of what came before: SDPA as torch chooses its kernel and with cuDNN's
first, flash-attn where it is installed; liger's layer kernels off and on; gradient checkpointing on
and off. Always: weights, gradients and Adam's state in bf16 (`--dtype bf16`), the fused optimizer,
and TRL's own chunked head, which scores the answers' tokens alone. `padding_free` is not there to
be tried: TRL 1.x takes the setting and ignores it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.liger import apply_liger_kernel
from trl import DPOConfig, DPOTrainer

from megatron_longpo.data.rows.schema import IGNORED_LABEL, PreferenceRow
from megatron_longpo.model.spec import DTYPES
from tools.peer_case import (
    ADAM_BETAS,
    BETA,
    CLIP_GRAD,
    LEARNING_RATE,
    Case,
    Numbers,
    StepClock,
    Trials,
    device,
)
from tools.tiny_models import make_byte_tokenizer

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
LIGER = {"fused_linear_cross_entropy": False}
"""Layer kernels alone: TRL has a head of its own and refuses liger's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is tried."""

    attention: str
    """`sdpa`, `sdpa, cuDNN first`, or another `attn_implementation` of transformers."""
    liger: bool
    checkpointing: bool


class TokenRowsTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokens already, in their order; keeps unrounded numbers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[Tensor] = []
        self.metrics: list[dict[str, float]] = []
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        dataset: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses.append(loss.detach())
        self.metrics.append({name: values[-1] for name, values in self._metrics["train"].items()})
        return result


class ClockCallback(TrainerCallback):
    """Times a trainer's steps, and stops it where the clock has seen enough."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = self.clock.step_done()
        return control


def as_trl_dataset(rows: Sequence[PreferenceRow]) -> datasets.Dataset:
    """Returns rows as prompt and answers; an answer of ours runs to the end of its row."""

    def columns(row: PreferenceRow) -> dict[str, list[int]]:
        begin = int((row.chosen.labels != IGNORED_LABEL).argmax())
        assert (row.chosen.input_ids[:begin] == row.rejected.input_ids[:begin]).all()
        return {
            "prompt_ids": row.chosen.input_ids[:begin].tolist(),
            "chosen_ids": row.chosen.input_ids[begin:].tolist(),
            "rejected_ids": row.rejected.input_ids[begin:].tolist(),
        }

    return datasets.Dataset.from_list([columns(row) for row in rows])


def main() -> None:
    case, result = Case.read(Path(sys.argv[1])), Path(sys.argv[2])
    case.write_inputs()
    trials = Trials(case, result)
    dataset = as_trl_dataset(case.rows())
    for settings in candidates(trials):

        def train(clock: StepClock, settings: Settings = settings) -> list[Numbers]:
            return train_steps(case, settings, dataset, clock)

        trials.run(asdict(settings), train)


def candidates(trials: Trials) -> Iterator[Settings]:
    """Yields what is worth trying, by the results so far. Liger comes last: it cannot be undone
    within a process."""
    first = Settings(attention="sdpa", liger=False, checkpointing=True)  # TRL's defaults
    for attention in attentions():
        yield replace(first, attention=attention)
    fastest = trials.best.settings["attention"] if trials.best else "sdpa"
    yield replace(first, attention=fastest, checkpointing=False)
    if has_liger():
        for checkpointing in (True, False):
            yield Settings(attention=fastest, liger=True, checkpointing=checkpointing)


def attentions() -> list[str]:
    if not torch.cuda.is_available():
        return ["sdpa"]
    installed = {"flash_attn": "flash_attention_2", "flash_attn_interface": "flash_attention_3"}
    return ["sdpa", "sdpa, cuDNN first"] + [
        name for module, name in installed.items() if importlib.util.find_spec(module)
    ]


def has_liger() -> bool:
    """Returns whether Liger runs here: its kernels are Triton's, which needs a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


def train_steps(
    case: Case, settings: Settings, dataset: datasets.Dataset, clock: StepClock
) -> list[Numbers]:
    policy = load(case, settings)
    reference = None
    if case.reference == "online":
        reference = load(case, settings)
        if settings.liger:  # which TRL applies to the policy alone
            apply_liger_kernel(reference, LIGER)
    with attention_kernel(settings.attention):
        trainer = TokenRowsTrainer(
            model=policy,
            ref_model=reference,
            args=arguments(case, settings),
            train_dataset=dataset,
            processing_class=make_byte_tokenizer(),
            callbacks=[ClockCallback(clock)],
        )
        trainer.train()
    return [
        Numbers(float(loss), metrics["logps/chosen"], metrics["logps/rejected"])
        for loss, metrics in zip(trainer.losses, trainer.metrics, strict=True)
    ]


def load(case: Case, settings: Settings) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        case.model_folder,
        dtype=DTYPES[case.dtype],
        attn_implementation=settings.attention.split(",")[0],
        device_map=device(),
    )


def attention_kernel(attention: str) -> AbstractContextManager[Any]:
    if attention == "sdpa, cuDNN first":
        return sdpa_kernel(CUDNN_FIRST, set_priority=True)
    return nullcontext()


def arguments(case: Case, settings: Settings) -> DPOConfig:
    return DPOConfig(
        output_dir=str(Path(case.folder) / "trl"),
        per_device_train_batch_size=1,
        max_steps=case.num_steps,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=case.reference == "cached",
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=ADAM_BETAS[0],
        adam_beta2=ADAM_BETAS[1],
        max_grad_norm=CLIP_GRAD,
        bf16=case.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=settings.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=settings.liger,
        liger_kernel_config=LIGER if settings.liger else None,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
