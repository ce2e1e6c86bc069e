"""ft_dagster keeps a fine-tuned language model as fresh as the reports it learned from."""

__version__ = "0.1.0"
