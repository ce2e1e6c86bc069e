"""Train a LoRA adapter on packed rows, in a process of its own: `python -m ft_dagster.training REQUEST`."""
