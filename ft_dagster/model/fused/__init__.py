"""Llama and Mistral layers on a CPU, with a backward pass written out by hand."""
