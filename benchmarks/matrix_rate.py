"""Measure this machine's rate of matrix products, in GFLOP per CPU-second: `matrix_rate.py THREADS FORMAT`."""

import statistics
import sys
import time

import torch

SIZE = 4096
PRODUCTS = 5


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    first, second = (torch.randn(SIZE, SIZE).to(getattr(torch, sys.argv[2])) for _ in range(2))
    result = torch.mm(first, second)
    rates = []
    for _ in range(PRODUCTS):
        began = time.process_time()
        torch.mm(first, second, out=result)
        rates.append(2 * SIZE**3 / 1e9 / (time.process_time() - began))
    print(statistics.median(rates))


if __name__ == "__main__":
    main()
