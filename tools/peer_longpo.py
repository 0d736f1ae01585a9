"""Our side of tools/bench_peers.py: the steps of `longpo train` with `objective.name dpo`.

    python -m tools.peer_longpo case.json result.json none

One value of `train.recompute` a process: Megatron's wrapper, whose hooks hold on to it, keeps a
model in memory for as long as a process lives. Kernels and layers are those that `auto` chooses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_longpo.config.train import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
    resolve,
    resolve_reference,
)
from megatron_longpo.parallel import groups
from megatron_longpo.reference import run as reference_pass
from megatron_longpo.training import loop
from tools.peer_case import (
    ADAM_BETAS,
    BETA,
    CLIP_GRAD,
    LEARNING_RATE,
    Case,
    Numbers,
    StepClock,
    Trials,
    free_memory,
)


def main() -> None:
    case, result, recompute = Case.read(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
    case.write_inputs()
    if case.reference == "cached":
        score_reference(case)
    Trials(case, result).run(
        {"recompute": recompute}, lambda clock: train_steps(settings(case, recompute), clock)
    )
    groups.shutdown()


def score_reference(case: Case) -> None:
    """Writes reference log-probs as `longpo reference` does, for the mode cached."""
    reference_pass.compute(resolve_reference(settings(case, "none")))
    free_memory()


def train_steps(config: TrainConfig, clock: StepClock) -> list[Numbers]:
    run = loop.prepare(config)
    numbers = []
    clock.start()
    is_done = False
    while not is_done:
        metrics: dict[str, Any] = loop.train_step(run)
        is_done = clock.step_done()
        numbers.append(Numbers(metrics["loss"], metrics["logps/chosen"], metrics["logps/rejected"]))
    return numbers


def settings(case: Case, recompute: str) -> TrainConfig:
    return resolve(
        TrainConfig(
            model=ModelConfig(hf_path=str(case.model_folder), dtype=case.dtype),  # type: ignore[arg-type]
            reference=ReferenceConfig(mode=case.reference),  # type: ignore[arg-type]
            data=DataConfig(path=str(case.rows_path), max_length=case.context, shuffle=False),
            objective=ObjectiveConfig(name="dpo", beta=BETA),
            optimizer=OptimizerConfig(
                name="adam",
                lr=LEARNING_RATE,
                lr_schedule="constant",
                warmup_ratio=0.0,
                beta1=ADAM_BETAS[0],
                beta2=ADAM_BETAS[1],
                clip_grad=CLIP_GRAD,
            ),
            train=RunConfig(
                global_batch_pairs=1,
                steps=case.num_steps,
                recompute=recompute,  # type: ignore[arg-type]
            ),
            checkpoint=CheckpointConfig(interval=0),
            logging=LoggingConfig(dir=str(Path(case.folder) / case.name), tensorboard=False),
        )
    )


if __name__ == "__main__":
    main()
