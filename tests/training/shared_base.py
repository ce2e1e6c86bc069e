"""Run by torchrun: computes a loss and its gradients with the base sharded among processes, as FSDP does on GPUs."""

import json
import sys
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import fully_shard

from ft_dagster.dataset.dataset import load_rows
from ft_dagster.model import ranks
from ft_dagster.model.load import add_adapter, load_base
from ft_dagster.model.packed_model import PackedModel
from ft_dagster.model.rows import collate
from ft_dagster.runtime.parent import die_with_parent
from ft_dagster.runtime.processes import leave
from ft_dagster.store.local import Artifact
from ft_dagster.training.request import TrainingRequest
from ft_dagster.training.trainer import forwards_to


def look(request: TrainingRequest, shared: bool) -> dict[str, Any]:
    """Return the summed nats of this process's rows and the gradients of the adapter, summed over the processes."""
    recipe = request.resolved_recipe()
    model = add_adapter(load_base(request.prepared_base(), recipe, offload=None), request.prepared_base(), recipe)
    packed = PackedModel(model, recipe)
    if shared:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    rows = list(load_rows(Artifact.open(Path(request.dataset)), "train").select(range(4)))
    mine = rows[ranks.rank() :: ranks.count()]
    with forwards_to(model, packed.summed_nats):
        nats = model(collate(mine, 2))
    nats.backward()
    gradients = {n: ranks.whole(p.grad) * ranks.count() for n, p in model.named_parameters() if p.requires_grad}
    return {"nats": nats.item(), "gradients": {name: g.flatten().tolist() for name, g in gradients.items()}}


if __name__ == "__main__":
    die_with_parent()
    with ranks.joined():
        found = look(TrainingRequest.read(Path(sys.argv[1])), shared=True)
        Path(f"{sys.argv[1]}.{ranks.rank()}").write_text(json.dumps(found))
    leave(0)
