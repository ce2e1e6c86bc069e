"""Packed rows as tensors: which tokens are supervised, and with which weights."""

import pytest
import torch

from ft_dagster.config.recipe import Objectives
from ft_dagster.model.rows import IGNORED, collate, loss_weights

TEXT = {"input_ids": [5, 6, 7, 8, 9], "lengths": [2, 3], "prompts": [1, 1], "objectives": [0, 0]}
MIXED = {"input_ids": [4, 3, 5, 6, 7, 2], "lengths": [2, 4], "prompts": [1, 2], "objectives": [0, 1]}
SHORT = {"input_ids": [4, 3], "lengths": [2], "prompts": [1], "objectives": [0]}


def test_rows_become_tensors_with_positions_and_labels_by_piece() -> None:
    batch = collate([TEXT, SHORT], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED, 8, 9], [IGNORED, 3, IGNORED, IGNORED, IGNORED]]
    assert batch["row_lengths"].tolist() == [5, 2]
    assert batch.keys() == {"input_ids", "position_ids", "labels", "row_lengths"}


def test_a_prompt_is_read_and_not_supervised() -> None:
    batch = collate([MIXED], pad_id=2)
    assert batch["labels"].tolist() == [[IGNORED, 3, IGNORED, IGNORED, 7, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3]]


def test_each_supervised_token_has_the_weight_of_its_objective() -> None:
    batch = collate([MIXED, SHORT], 2, weights=(1.0, 0.25))
    assert batch["weights"].tolist() == [[0, 1.0, 0, 0, 0.25, 0.25], [0, 1.0, 0, 0, 0, 0]]
    assert batch["weights"].dtype == torch.float32
    assert torch.equal(batch["labels"], collate([MIXED, SHORT], 2)["labels"])


@pytest.mark.parametrize(
    ("objectives", "weights"),
    [
        (Objectives(), None),
        (Objectives(text=0, rewrite=0.5), None),
        (Objectives(text=0.5, rewrite=0.5), None),
        (Objectives(text=1, rewrite=0.25), (1.0, 0.25)),
        (Objectives(text=0.5, rewrite=2), (0.5, 2.0)),
    ],
)
def test_weights_are_used_only_if_objectives_have_different_weights(
    objectives: Objectives, weights: tuple[float, ...] | None
) -> None:
    assert loss_weights(objectives) == weights
