"""Start training from an earlier adapter: its weights, and the rows that it has not learned from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.dataset.shard import Document
from ft_dagster.errors import TrainingError
from ft_dagster.model.manifest import check_adapter, read_manifest


def go_on_from(model: PeftModel, folder: Path, base: PreparedBase) -> None:
    """Load the weights of an earlier adapter into the model.

    Raises:
        AdapterError: the adapter belongs to another base, or it is incomplete.
        TrainingError: the adapter has layers that the model's adapter lacks.
    """
    check_adapter(folder, base)
    weights = load_peft_weights(str(folder), device="cpu")
    problems = set_peft_model_state_dict(model, weights)
    if problems.unexpected_keys:
        raise TrainingError(
            f"The adapter {folder.name} has other layers than the recipe ({problems.unexpected_keys[0]}). Set "
            "training.start: base in the recipe, or set lora to the values that the adapter was trained with."
        )


def rows_to_learn(rows: Dataset, documents: Sequence[Document], known: frozenset[str], replay: float) -> Dataset:
    """Return the rows that contain a section which is not yet known, and a share of the others.

    A hash of their tokens decides which of the others are chosen, so that they are the same each time.

    Args:
        rows: the rows of one group of chapters.
        documents: the documents that the rows' `documents` index.
        known: the hashes of the sections that the earlier adapter learned from.
        replay: the share of rows without new text that are kept, so that their text is not forgotten.
    """

    def wanted(owners: Sequence[int], tokens: Sequence[int]) -> bool:
        if any(documents[index].section not in known for index in owners):
            return True
        return int.from_bytes(hashlib.sha256(repr(tokens).encode()).digest()[:8]) / 2**64 < replay

    chosen = [i for i, row in enumerate(rows) if wanted(row["documents"], row["input_ids"])]
    return rows.select(chosen)


def known_sections(folder: Path) -> frozenset[str]:
    """Return the hashes of the sections that an adapter learned from, according to its manifest."""
    return frozenset(item["section"] for item in read_manifest(folder).trained_on)
