"""Packed token blocks -> a LoRA adapter. Runs in a process of its own: `python -m ft_dagster.training REQUEST`."""
