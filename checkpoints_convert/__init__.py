"""Model weights between Hugging Face folders and Megatron checkpoints."""
