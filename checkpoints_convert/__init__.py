"""Model weights between Hugging Face folders and Megatron checkpoints."""

import warnings

# Here, because `python -m checkpoints_convert.X` imports Megatron before any function runs.
warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed")
