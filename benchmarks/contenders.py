"""The contenders of benchmarks/training.py, and those that could not be included."""

from dataclasses import dataclass, field
from typing import Any

OURS = "ft_dagster"


@dataclass(frozen=True)
class Contender:
    """One way to make an adapter."""

    name: str
    script: str
    requirements: str | None
    """Requirements file in benchmarks/peers/; None for the project's own environment."""
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    all_linear: bool = True
    """Whether it applies LoRA to the same layers as the recipe, so that its operations can be counted."""
    lossless: bool = True
    """Whether all of the text reaches its loss (except the first token of every piece)."""


CONTENDERS = [
    Contender(
        "original",
        "original.py",
        "hugging_face.txt",
        "the recipe of fine_tune.py: one example a file, cut at 512 tokens; LoRA on q, k, v, o; NF4; checkpointing; "
        "its own learning rate and warm-up. Instead of fp16, which does not work on a CPU, the common number format",
        all_linear=False,
        lossless=False,
    ),
    Contender(
        "trl",
        "trl_sft.py",
        "hugging_face.txt",
        "SFTTrainer with `packing=True` and otherwise its defaults: strategy `bfd`, float32 weights (in bfloat16 under "
        "autocast), gradient checkpointing",
        {"strategy": "bfd", "best": False},
        lossless=False,
    ),
    Contender(
        "trl-lossless",
        "trl_sft.py",
        "hugging_face.txt",
        "SFTTrainer with `bfd_split`, frozen weights in the number format, no checkpointing",
        {"strategy": "bfd_split", "best": True},
    ),
    Contender(
        "litgpt",
        "litgpt_lora.py",
        "litgpt.txt",
        "`litgpt finetune_lora`, bf16-true or 32-true: it has no packing, so each chapter is a sequence and a step; "
        "its own schedule",
    ),
    Contender(OURS, "ours.py", None, "`python -m ft_dagster.training`, the shipped recipe"),
]
NOT_RUN = (
    "Not run: LLaMA-Factory 0.9.5. Importing it imports torchaudio and, through transformers, torchvision, whose "
    "wheels on PyPI (2.11.0 and 0.28.0) are built for CUDA. With torch 2.13.0+cpu: `OSError: Could not load this "
    "library: .../torchaudio/lib/_torchaudio.abi3.so` and `RuntimeError: operator torchvision::nms does not exist`; "
    "without them: `ModuleNotFoundError: No module named 'torchaudio'`."
)
