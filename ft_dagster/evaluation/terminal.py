"""`python -m ft_dagster.evaluation.terminal REQUEST.json`: talk to an adapter, with the terminal of whoever started it.

Exit codes: 0 done, 1 failed, 130 interrupted.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

from rich.console import Console

from ft_dagster.errors import UserError
from ft_dagster.evaluation.request import TalkRequest
from ft_dagster.training.allocator import keep_freed_memory


def main(path: Path) -> int:
    keep_freed_memory()
    warnings.simplefilter("ignore")  # what libraries say to developers would stand among the answers
    logging.disable(logging.WARNING)
    import torch

    from ft_dagster.evaluation.talk import talk

    console = Console(stderr=True)
    try:
        talk(TalkRequest(**json.loads(path.read_bytes())), console)
    except UserError as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False, highlight=False)
        return 1
    except torch.OutOfMemoryError as error:
        console.print(f"{error}\nThe GPU has too little memory; a training may be using it.", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
