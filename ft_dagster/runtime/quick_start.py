"""A quicker start of the processes that train and measure, where importing libraries is most of a short job.

Three costs are left out, none of which changes a result:

- Optional packages that the libraries import only because they are installed. transformers imports scipy for the loss
  of object detection and scikit-learn for assisted generation, accelerate imports boto3 for SageMaker.
- The compiler. bitsandbytes wraps functions in `torch.compile` when it is imported, and peft imports bitsandbytes
  wherever it is installed: this loads torch._inductor for functions that only a quantized base calls.
- The garbage collector, which looks at the growing heap of modules again and again and finds nothing.

A library that changes makes the start slower, and breaks nothing: see `import_quickly`.
"""

import gc
import importlib
import logging
import os
import sys

from ft_dagster.config.recipe import Recipe

log = logging.getLogger(__name__)
UNUSED_PACKAGES = ("boto3", "scipy", "sklearn")
"""What no code of this project uses in a process that trains or measures, directly or through a library."""


def compile_nothing(recipe: Recipe) -> None:
    """Turn `torch.compile` off for this process and its children, where nothing that the recipe asks for uses it.

    bitsandbytes compiles its layers and optimizers. Call this before torch is imported; a variable that is set already
    keeps its value.
    """
    if recipe.base.quantization == "none" and recipe.training.optimizer == "adamw_torch":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def import_quickly(module: str) -> None:
    """Import a module while UNUSED_PACKAGES look as if they were not installed.

    Where a library turns out to need one of them, the packages come back and nothing is said: the import statement that
    follows the call imports what is missing, and raises an error that has another cause.
    """
    hidden = [name for name in UNUSED_PACKAGES if name not in sys.modules]
    # For Python, None in sys.modules means that there is no such module: find_spec, too, then finds nothing.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    gc.disable()
    try:
        importlib.import_module(module)
    except ImportError as error:
        log.debug("Not imported quickly: %s", error)
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        gc.freeze()  # modules live as long as the process: later collections need not look at them
        gc.enable()
