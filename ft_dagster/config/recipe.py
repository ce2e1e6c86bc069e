"""What to train and how: one typed recipe, read from YAML.

A recipe has one part for each stage that reads it. Every option that changes what a stage makes is in that stage's
part, so that the hash of the part can be in the key of the artifact.

The docstrings of parts and fields are the descriptions in docs/recipes.md: Markdown, written there by `make docs`.
"""

import re
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from ft_dagster.config.recipe_part import Part

AUTO: Final = "auto"
"""The value of `base.dtype` with which the machine decides."""
_BEFORE_AUTO = "bfloat16"
"""The default of `base.dtype` in versions without `auto`."""


def _layer_names(value: Any) -> Any:
    named = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
    if value == "all-linear" or named:
        return value
    raise ValueError(f"{value!r} is neither all-linear nor a list of layer names such as [q_proj, v_proj]")


class Base(Part):
    """The pretrained model that is tuned."""

    source: Literal["embedded", "hub", "folder"]
    """Where it comes from: the package that comes with the project, a Hugging Face hub, or a local folder."""
    model: str = Field(min_length=1)
    """Its name there: `smollm2-135m-instruct`, a repository, or a path (relative to the workspace)."""
    revision: str | None = None
    """The full commit hash to pin; required with `source: hub`, so that the base cannot change under an adapter."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """How frozen weights are stored: as they are, in 4-bit NF4 with double quantization (QLoRA), or in 8 bits."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = AUTO
    """The number format of frozen weights and of matrix products. `auto`: the one that is
    [fast on the machine](training.md#number-formats) that trains or measures: bfloat16, otherwise float32 on a CPU and
    float16 on a GPU. `float16` needs a GPU."""

    _written: str | None = PrivateAttr(None)
    """`model` as the recipe contains it, where `model` is a folder that was located in the workspace."""

    def located(self, workspace: Path) -> "Base":
        """Return the base with the absolute path of its folder. Keys still contain the path that the recipe contains.

        A workspace that is moved or restored elsewhere, together with its base, therefore has nothing to do.
        """
        found = self.model_copy(update={"model": str(workspace / Path(self.model).expanduser())})
        found._written = self.model
        return found

    def for_keys(self, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
        found = super().for_keys(include, exclude)
        return found | {"model": self._written} if self._written is not None and "model" in found else found

    def as_absolute(self) -> "Base":
        """Return the base whose keys contain the absolute path, as they did in earlier versions."""
        found = self.model_copy()
        found._written = None
        return found

    @model_validator(mode="after")
    def _pinned(self) -> "Base":
        if self.source == "hub" and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "base.revision is needed with base.source: hub, as the full commit hash of the repository "
                "(a branch such as main would let the base change under its adapters)"
            )
        return self


class Corpus(Part):
    """Which text of the reports is used."""

    unreadable: Literal["fail", "skip"] = "fail"
    """What happens when a file cannot be read: the run stops before training, or the file is left out and listed."""
    secrets: Literal["warn", "block"] = "warn"
    """What happens when text [looks like a key or personal data](security.md): a check lists it, or stops the run."""
    drafts: bool = False
    """Whether first drafts (JSON sections that are plain strings) are used where no better version exists."""
    bibliographies: bool = False
    """Whether bibliographies are kept as text."""
    review_blocks: bool = False
    """Whether citation review blocks are kept as text."""
    minimum_score: float | None = Field(default=None, ge=0, le=1)
    """Reviewed sections whose last mean panel score is lower are left out; those without scores are kept."""


class Tokens(Part):
    """How sections become blocks of tokens."""

    block_length: int = Field(default=512, ge=16)
    """Number of tokens in a packed row."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the text that is [held out for evaluation](graph.md#held-out-chapters). Another value chooses anew."""


class Objectives(Part):
    """What is taught, and how much a token of each objective weighs in the loss."""

    text: float = Field(default=1.0, ge=0)
    """Sections as prose; 0 teaches none."""
    rewrite: float = Field(default=0.0, ge=0)
    """Improved texts as answers to their originals, through the base's chat template; 0 teaches none."""

    @model_validator(mode="after")
    def _something(self) -> "Objectives":
        if not self.taught:
            raise ValueError(
                "objectives.text and objectives.rewrite are both 0, so that nothing would be taught; "
                "leave them out to teach text"
            )
        return self

    @property
    def taught(self) -> list[str]:
        """The objectives with a weight above 0, for which the dataset is made."""
        return [name for name in type(self).model_fields if getattr(self, name)]


class Lora(Part):
    """The adapter. Defaults: all linear layers and `alpha` = 2 x `rank` (QLoRA, arXiv 2305.14314)."""

    REMOVED: ClassVar[Mapping[str, Any]] = {"init": "default"}

    rank: int = Field(default=16, ge=1)
    """Rows of the matrix A and columns of the matrix B that each layer gets."""
    alpha: float = Field(default=32, gt=0)
    """The adapter's output is scaled by `alpha / rank`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that the adapter does not see, drawn at random in each step."""
    targets: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_layer_names)] = "all-linear"
    """Which layers: all linear ones but the output head, or names such as `[q_proj, v_proj]`; a name that the base
    lacks is refused."""
    rslora: bool = False
    """Scale by `alpha / sqrt(rank)` instead, so that a high rank learns as fast as a low one (arXiv 2312.03732)."""
    dora: bool = False
    """Learn the magnitudes of weight columns apart from their directions (DoRA): slower, and better at low ranks (arXiv
    2402.09353)."""


class Training(Part):
    """How the adapter is trained."""

    start: Literal["base", "last"] = "base"
    """What training starts from: a fresh adapter, on all of the text; or the adapter in use, on what is new to it."""
    replay: float = Field(default=0.05, ge=0, le=1)
    """With `start: last`, the share of rows without new text that are trained on again (arXiv 2403.08763)."""
    epochs: float = Field(default=1.0, gt=0)
    """How often each row is trained on; with 0.5, half of the rows are trained on once."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """The highest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate changes after the warm-up: it falls to 0 in one of two ways, or stays constant."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    rows_per_device: int = Field(default=2, ge=1)
    """Packed rows in one forward pass."""
    rows_per_step: int = Field(default=4, ge=1)
    """Packed rows in one optimizer step, a multiple of `processes` times `rows_per_device`; gradients are accumulated
    to reach it."""
    processes: int = Field(default=1, ge=1)
    """Processes that train together, [one on each GPU](gpus.md), or that many on a CPU."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: each keeps the whole base, or, on GPUs, a part of it."""
    mixed_precision: Literal["bf16", "fp16"] | None = None
    """The number format of matrix products if weights are in float32; `null`: that of `base.dtype`. `fp16` needs a
    GPU."""
    optimizer: Literal["adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """AdamW with its state in 32 bits or in 8; `paged`: on a GPU the state may move to the machine's memory."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW on the adapter's weights."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm; a longer gradient is scaled down to it."""
    neftune: float | None = Field(default=None, gt=0)
    """Noise on the embeddings while training, as the paper's alpha (NEFTune, arXiv 2310.05914)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which needs less memory and about a third more time."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """How transformers computes attention in layers that are not fused."""
    fused: bool = True
    """Whether a CPU computes Llama and Mistral layers with [a backward pass written out](training.md), which is
    faster; used if the base is not quantized and the adapter is plain LoRA without dropout."""
    save_every: int = Field(default=50, ge=1)
    """Optimizer steps between checkpoints; two are kept."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between measurements of held-out bits per byte; the weights that measured best are kept. `null`:
    nothing is measured while training, and the last weights are kept."""
    patience: int | None = Field(default=None, ge=1)
    """Measurements without gain after which training stops; needs `evaluate_every`. `null`: it never stops early."""
    seed: int = Field(default=17, ge=0)
    """Seed of all random numbers: initial weights, order of rows, dropout."""

    @model_validator(mode="after")
    def _something_to_wait_for(self) -> "Training":
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError(
                f"training.patience ({self.patience}) needs training.evaluate_every, the optimizer steps between "
                "measurements that it counts"
            )
        return self

    @model_validator(mode="after")
    def _whole_steps(self) -> "Training":
        at_once = self.rows_per_device * self.processes
        if self.rows_per_step % at_once:
            among = f" times training.processes ({self.processes})" if self.processes > 1 else ""
            raise ValueError(
                f"training.rows_per_step ({self.rows_per_step}) must be a multiple of "
                f"training.rows_per_device ({self.rows_per_device}){among}"
            )
        return self

    @model_validator(mode="after")
    def _parts_of_the_base(self) -> "Training":
        if self.strategy == "fsdp" and self.processes == 1:
            raise ValueError("training.strategy: fsdp shares the base among training.processes, which is 1; set ddp")
        if self.strategy == "fsdp" and self.evaluate_every is not None:
            raise ValueError(
                "training.evaluate_every does not go with training.strategy: fsdp, where no process has a whole model "
                "to measure; set ddp or leave it out"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Forward passes of each process in one optimizer step."""
        return self.rows_per_step // (self.rows_per_device * self.processes)


class Evaluation(Part):
    """What is measured on a new adapter."""

    prompts: tuple[str, ...] = ("The main difference between the two approaches is",)
    """Prompts that base and adapter continue; their texts are shown side by side."""
    sample_tokens: int = Field(default=48, ge=0)
    """Tokens generated for each prompt."""
    general: str | None = "shipped"
    """Folder of texts (`.md`, `.txt`), relative to the workspace, that show whether
    [general English is forgotten](evaluation.md); `shipped`: the project's own; `null`: not measured."""
    chat: str | None = "shipped"
    """Folder of conversations (`.json`) that show whether instructions are still followed; values as for `general`."""
    train_tokens: int = Field(default=4096, ge=1)
    """Tokens of the training text that are measured: how much better the adapter predicts it than held-out text, and
    whether it recites it."""


class Release(Part):
    """What the gate requires of a new adapter."""

    LATER: ClassVar[Collection[str]] = ("minimum_held_out", "refit")

    minimum_gain: float = Field(default=0.0, ge=0)
    """Bits per byte by which the adapter must be better than the base, and than the released adapter, on held-out
    chapters."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of the intervals: the lower end of the gain over the base must exceed `minimum_gain`."""
    worst_loss: float = Field(default=0.02, ge=0)
    """Bits per byte by which the adapter may be worse than the released one at the lower end of the interval."""
    general_loss: float = Field(default=0.1, ge=0)
    """Bits per byte by which the adapter may be worse than the base on general text."""
    chat_loss: float = Field(default=0.1, ge=0)
    """Bits per byte by which the adapter may be worse than the base on answers in conversations."""
    recited: float = Field(default=0.02, ge=0, le=1)
    """Share of training passages that the adapter may recite word for word, beyond those that the base recites."""
    minimum_held_out: int = Field(default=2000, ge=0)
    """Bytes of held-out text that are required, in at least two sections: less proves nothing. 0: no such rule."""
    other_base: bool = False
    """Whether the adapter may replace one of another base model, with which it is not compared."""
    refit: bool = False
    """Whether an adapter that passed the gate is [trained once more on all text](evaluation.md#refitting), the held-out
    text included, and that one is released."""

    def for_keys(self, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return the part as the gate reads it. Refitting comes after the gate, so only the release counts it."""
        return super().for_keys(include, (*exclude, "refit"))


class Recipe(Part):
    """One resolved recipe: every field has its value."""

    name: str
    """A name for people; it has no effect."""
    base: Base
    corpus: Corpus = Corpus()
    tokens: Tokens = Tokens()
    objectives: Objectives = Objectives()
    lora: Lora = Lora()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    release: Release = Release()

    @property
    def compute_dtype(self) -> str:
        """The number format of matrix products; `auto` while it is not decided."""
        mixed = {"bf16": "bfloat16", "fp16": "float16", None: self.base.dtype}
        return mixed[self.training.mixed_precision]

    @model_validator(mode="after")
    def _mixed(self) -> "Recipe":
        if self.training.mixed_precision and self.base.dtype != "float32":
            raise ValueError(
                f"training.mixed_precision ({self.training.mixed_precision}) needs base.dtype: float32; with "
                f"{self.base.dtype} products are computed in that already"
            )
        if self.training.strategy == "fsdp" and self.base.quantization == "int8":
            raise ValueError("training.strategy: fsdp does not go with base.quantization: int8; set nf4, none or ddp")
        return self

    @model_validator(mode="after")
    def _dequantizable(self) -> "Recipe":
        if self.lora.dora and self.base.quantization == "int8":
            raise ValueError(
                "lora.dora does not go with base.quantization: int8 (peft loses the scales of 8-bit weights on a CPU); "
                "set nf4 or none"
            )
        return self

    def part(self, *names: str) -> dict[str, Any]:
        """Return the named parts, or attributes of a part (`objectives.taught`), as the plain JSON in keys."""
        found = {name: attrgetter(name)(self) for name in names}
        return {name: part.for_keys() if isinstance(part, Part) else part for name, part in found.items()}

    def computing_in(self, number_format: str) -> "Recipe":
        """Return the recipe with `base.dtype: auto` replaced; a recipe that names a format stays as it is."""
        if self.base.dtype != AUTO:
            return self
        return self.model_copy(update={"base": self.base.model_copy(update={"dtype": number_format})})

    @property
    def readings(self) -> tuple["Recipe", ...]:
        """This recipe, and how earlier versions would have read it: an artifact made by any of them is up to date.

        They computed in bfloat16 where `base.dtype` is now `auto`, and their keys contained the absolute path of a base
        in a folder.
        """
        found = [self]
        for earlier in (lambda r: r.computing_in(_BEFORE_AUTO), lambda r: r._with_absolute_base()):
            found += [reading for reading in map(earlier, list(found)) if reading not in found]
        return tuple(found)

    def _with_absolute_base(self) -> "Recipe":
        return self.model_copy(update={"base": self.base.as_absolute()})
