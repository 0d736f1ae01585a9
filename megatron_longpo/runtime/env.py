"""`longpo env`: what this machine has, and what the missing optional packages cost."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from typing import Any

from megatron_longpo import __version__

REQUIRED = (
    "torch",
    "megatron-core",
    "transformers",
    "datasets",
    "safetensors",
    "numpy",
    "orjson",
    "jsonargparse",
    "psutil",
)

OPTIONAL = {
    "transformer-engine": "no cuDNN attention and no fused layers: about half the speed on Hopper",
    "flash-attn-4": "attention on Hopper and newer GPUs takes about a sixth longer",
    "flash-attn": "attention on GPUs falls back to torch's kernels",
    "apex": "no fused gradient accumulation: a little slower with tensor parallelism",
    "liger-kernel": "nothing of ours needs it; benchmarks compare with it",
    "triton": "no fused GPU kernels: the log-prob head and RMSprop are slower",
    "wandb": "logging.wandb cannot be set",
    "tensorboard": "logging.tensorboard must be false",
    "matplotlib": "longpo report cannot plot",
    "lm-eval": "no evaluation with lm-evaluation-harness",
    "gguf": "the quickstart cannot unpack its model",
}
"""Package -> what its absence costs."""

MODULES = {
    # PyPI has another package of this name; the one we need has this extension.
    "apex": "fused_weight_gradient_mlp_cuda",
    "transformer-engine": "transformer_engine",
    # Both packages fill the folder flash_attn.
    "flash-attn-4": "flash_attn.cute",
    "flash-attn": "flash_attn.flash_attn_interface",
    "liger-kernel": "liger_kernel",
    "lm-eval": "lm_eval",
    "megatron-core": "megatron.core",
}
"""Package -> its module, if that has another name."""


def run_env(*, json: bool = False) -> None:
    """Prints the report; a broken package is a line of it, never a traceback."""
    facts = environment()
    if json:
        _print_json(facts)
    else:
        _print_tables(facts)


def environment() -> dict[str, Any]:
    """Returns everything that `longpo env` shows, as plain JSON types."""
    optional = {name: package_version(name) for name in OPTIONAL}
    return {
        "megatron_longpo": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: package_version(name) for name in REQUIRED},
        "cuda": _cuda_facts(),
        "optional": optional,
        "missing": {name: OPTIONAL[name] for name, version in optional.items() if version is None},
    }


def package_version(name: str) -> str | None:
    """Returns a package's version, or None if it cannot be imported.

    Some containers ship modules without their metadata. For these it returns "installed".
    """
    module = MODULES.get(name, name)
    found = False
    with contextlib.suppress(Exception):
        found = importlib.util.find_spec(module) is not None
    if not found:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _cuda_facts() -> dict[str, Any]:
    try:
        # A broken torch fails in many ways, from ImportError to OSError on a shared library.
        torch = importlib.import_module("torch")
    except Exception as error:
        return {"error": f"torch cannot be imported: {' '.join(str(error).split())}"}
    facts: dict[str, Any] = {
        "built_for": torch.version.cuda,
        "available": _tried(torch.cuda.is_available),
        "cudnn": _tried(torch.backends.cudnn.version),
        "gpus": [],
    }
    if facts["available"] is True:
        facts["nccl"] = _tried(lambda: ".".join(str(part) for part in torch.cuda.nccl.version()))
        facts["gpus"] = _tried(lambda: _gpus(torch))
    return facts


def _gpus(torch: Any) -> list[str]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gibibytes = properties.total_memory / 2**30
        gpus.append(
            f"{properties.name}, {gibibytes:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
    return gpus


def _tried(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return f"unknown ({' '.join(str(error).split())})"


def _print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=2))


def _print_tables(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = Table(title="versions", title_justify="left", show_header=False)
    for name in ("megatron_longpo", "python", "platform", "cpus"):
        versions.add_row(name, str(facts[name]))
    for name, version in facts["packages"].items():
        versions.add_row(name, version or "[red]missing[/red]")
    for name, value in facts["cuda"].items():
        if name != "gpus":
            versions.add_row(f"CUDA {name}", "none" if value is None else str(value))
    console.print(versions)

    gpus = facts["cuda"].get("gpus") or []
    lines = gpus if isinstance(gpus, list) else [gpus]
    console.print("GPUs: none, so everything runs on the CPU" if not lines else "GPUs:")
    for index, line in enumerate(lines):
        console.print(f"  {index}: {line}", highlight=False)

    optional = Table("optional package", "version", "without it", title="optional packages")
    optional.title_justify = "left"
    for name, version in facts["optional"].items():
        cost = "" if version else OPTIONAL[name]
        optional.add_row(name, version or "[yellow]missing[/yellow]", cost)
    console.print(optional)
