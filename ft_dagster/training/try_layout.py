"""`python -m ft_dagster.training.try_layout REQUEST.json`: try if a base's rows can be packed. Exit codes: 0, or 1.

The base is loaded as for a training, and the losses of two pieces in one row are compared (model/layout.py).
"""

import json
from pathlib import Path

from ft_dagster.runtime.child import exit_code, run_child
from ft_dagster.runtime.lease import leased
from ft_dagster.runtime.quick_start import compile_nothing, import_quickly
from ft_dagster.store.local import write_atomically
from ft_dagster.training.request import LayoutRequest


def main(request_path: Path) -> int:
    """Try the base, and return the exit code."""
    return exit_code(lambda: _try(LayoutRequest.read(request_path)), request_path.parent)


def _try(request: LayoutRequest) -> int:
    with leased(Path(request.locks)):
        recipe = request.resolved_recipe()
        compile_nothing(recipe)
        import_quickly("ft_dagster.model.packed_model")
        from ft_dagster.model.load import load_base
        from ft_dagster.model.packed_model import PackedModel

        tried = PackedModel(load_base(request.prepared_base(), recipe, offload=None), recipe)
    write_atomically(Path(request.output), json.dumps({"layout": tried.layout, "leak": tried.leak}))
    return 0


if __name__ == "__main__":
    run_child("ft_dagster.training.try_layout", main)
