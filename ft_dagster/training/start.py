"""Going on from an earlier adapter: its weights, and the rows that it has not learned from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

from ft_dagster.base.prepare import PreparedBase
from ft_dagster.dataset.shard import Document
from ft_dagster.errors import TrainingError
from ft_dagster.model.manifest import check_adapter, read_manifest


def go_on_from(model: PeftModel, folder: Path, base: PreparedBase) -> None:
    """Give the model the weights of an earlier adapter.

    Raises:
        AdapterError: that adapter belongs to another base, or is not whole.
        TrainingError: its weights are not of the same shape.
    """
    check_adapter(folder, base)
    weights = load_peft_weights(str(folder), device="cpu")
    problems = set_peft_model_state_dict(model, weights)
    if problems.unexpected_keys:
        raise TrainingError(
            f"The adapter {folder.name} has other layers than the recipe ({problems.unexpected_keys[0]}). Set "
            "training.start to base, or lora in the recipe to what it was made with."
        )


def rows_to_learn(rows: Dataset, documents: Sequence[Document], known: frozenset[str], replay: float) -> Dataset:
    """The rows that hold a section which is not known yet, and a share of the others.

    Which others is decided by a hash of what is in them, so that the same rows are chosen each time.

    Args:
        rows: of one group of chapters.
        documents: that `rows` count.
        known: hashes of the sections that the earlier adapter learned from.
        replay: share of the rows without new text to keep, so that they are not forgotten.
    """

    def wanted(owners: Sequence[int], tokens: Sequence[int]) -> bool:
        if any(documents[index].section not in known for index in owners):
            return True
        return int.from_bytes(hashlib.sha256(repr(tokens).encode()).digest()[:8]) / 2**64 < replay

    chosen = [i for i, row in enumerate(rows) if wanted(row["documents"], row["input_ids"])]
    return rows.select(chosen)


def known_sections(folder: Path) -> frozenset[str]:
    """Hashes of the sections an adapter learned from, by its manifest."""
    return frozenset(item["section"] for item in read_manifest(folder).trained_on)
