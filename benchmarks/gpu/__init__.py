"""Check training on a GPU, and measure its speed and memory: `python -m benchmarks.gpu`."""
