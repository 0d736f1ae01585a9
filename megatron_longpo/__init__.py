"""LongPO on Megatron-Core: give a short-context model a long context with its own preferences."""

__version__ = "0.2.0"
