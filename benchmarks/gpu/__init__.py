"""Whether training is right on a GPU, how fast, and in how much memory: `python -m benchmarks.gpu`."""
