"""A faster start of the processes that train and measure: in a short job, importing libraries takes most of the time.

Three costs are avoided, none of which affects a result:

- Optional packages that the libraries import only because they are installed. transformers imports scipy for the loss
  of object detection and scikit-learn for assisted generation, and accelerate imports boto3 for SageMaker.
- The compiler. bitsandbytes wraps functions in `torch.compile` when it is imported, and peft imports bitsandbytes
  if it is installed. This loads torch._inductor for functions that only a quantized base model calls.
- The garbage collector, which scans the growing heap of modules again and again and finds nothing to free.

If a library changes, the start may become slower, but nothing breaks: see `import_quickly`.
"""

import gc
import importlib
import logging
import os
import sys

from ft_dagster.config.recipe import Recipe

log = logging.getLogger(__name__)
UNUSED_PACKAGES = ("boto3", "scipy", "sklearn")
"""Packages that a process that trains or measures never uses, neither directly nor through a library."""


def compile_nothing(recipe: Recipe) -> None:
    """Turn `torch.compile` off for this process and its children, unless something that the recipe asks for uses it.

    bitsandbytes compiles its layers and optimizers. Call this before torch is imported. If the environment sets
    TORCHDYNAMO_DISABLE already, its value is kept.
    """
    if recipe.base.quantization == "none" and recipe.training.optimizer == "adamw_torch":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def import_quickly(module: str) -> None:
    """Import a module while UNUSED_PACKAGES appear not to be installed.

    If the import fails, the packages become visible again and no error is raised: the import statement that follows the
    call imports what is missing, and raises the error if it has another cause.
    """
    hidden = [name for name in UNUSED_PACKAGES if name not in sys.modules]
    # With None in sys.modules, Python takes a module for missing: find_spec does not find it, either.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    gc.disable()
    try:
        importlib.import_module(module)
    except ImportError as error:
        log.debug("Not imported quickly: %s", error)
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        gc.freeze()  # modules live as long as the process, so later collections can skip them
        gc.enable()
