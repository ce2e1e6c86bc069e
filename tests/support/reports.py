"""Small reports and recipes for tests."""

from pathlib import Path
from typing import Any

PROSE = (
    "The committee met on Tuesday and read the report from the first page to the last. ",
    "Rivers carry sediment downstream, and the delta grows by a hand's breadth each year. ",
    "A ledger that balances to the byte is worth more than a promise that nothing was lost. ",
    "Costs fell in the second year because the office stopped printing what nobody read. ",
    "Each measurement was repeated three times, by people who did not know the earlier result. ",
)


def recipe_for(base: Path) -> dict[str, Any]:
    """Return a recipe, as plain data, that trains on the tiny base within seconds."""
    return {
        "name": "tiny",
        "base": {"source": "folder", "model": str(base)},
        "tokens": {"block_length": 64, "held_out": 0.2},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "training": {
            "epochs": 3,
            "learning_rate": 0.02,
            "rows_per_device": 2,
            "rows_per_step": 4,
            "save_every": 2,
        },
        "evaluation": {"prompts": ["The committee"], "sample_tokens": 4, "general": None, "chat": None},
        "release": {"minimum_held_out": 0},
    }


def chapter_text(number: int) -> str:
    """Return a chapter of plain prose, different for every number."""
    items = (PROSE[(number + i) % len(PROSE)] + f"It was item {number * 10 + i}. " for i in range(8))
    return f"# Chapter {number}\n\n## BACKGROUND KNOWLEDGE\n\n{''.join(items)}\n"


def prose_of(number: int) -> str:
    """Return only the prose of such a chapter."""
    return chapter_text(number).rpartition("\n\n")[2]
