"""Chapters that are parsed and tokenized on several machines give the dataset of a single machine."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import hosts
from ray_cluster import RayCluster

from ft_dagster.config.settings import load_settings
from ft_dagster.defs.assets.parallel_map import mapper_for

CHAPTERS = 2000
"""Several times the number of chapters worth distributing, in groups of at most 256."""
SCRIPT = """
import json, sys
from functools import partial
from pathlib import Path
from ft_dagster.corpus.sections import make_sections
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.defs.assets.parallel_map import mapper_for
from ft_dagster.config.recipe import Corpus, Tokens
from ft_dagster.config.settings import load_settings
from ft_dagster.store.local import Store
from ft_dagster.dataset.dataset import make_dataset, outline_sections
from ft_dagster.dataset.held_out.choice import choose_split
from ft_dagster.dataset.held_out.record import Pinned

folder, base = Path(sys.argv[1]), Path(sys.argv[2])
spread = mapper_for(load_settings())
assert spread is not map

def noted(function, item):
    import ray
    (folder / "nodes" / ray.get_runtime_context().get_node_id()).touch()
    return function(item)

(folder / "nodes").mkdir()
found = {}
for name, each in (("one", map), ("many", lambda function, items: spread(partial(noted, function), items))):
    store = Store(folder / name)
    sections = make_sections(take_snapshot(folder / "reports", folder / f"{name}.db", store), Corpus(), each)
    split = choose_split(outline_sections(sections), Tokens(), Pinned())
    dataset = make_dataset(outline_sections(sections), base, "tokenizer", Tokens(), split, each=each)
    found[name] = [sections.key, dict(sections.files), dataset.key, dict(dataset.files), sorted(store.blobs())]
print("found " + json.dumps({"same": found["one"] == found["many"], "blobs": len(found["one"][4]),
                             "nodes": len(list((folder / "nodes").iterdir()))}))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayCluster]:
    with hosts(2) as (head, worker):
        cluster = RayCluster([head, worker], tmp_path / "cache")
        cluster.start_head(num_cpus=1)
        cluster.start_worker(worker, num_cpus=1)
        yield cluster


def test_two_hosts_write_the_same_dataset_as_one_byte_for_byte(
    cluster: RayCluster, tmp_path: Path, tiny_base: Path
) -> None:
    reports = tmp_path / "reports" / "chapter_markdowns"
    reports.mkdir(parents=True)
    for number in range(CHAPTERS):
        (reports / f"chapter_{number}.md").write_text(f"# Chapter {number}\n\n## A\n\nRivers carry {number} stones.\n")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "FT_EXECUTOR": "ray",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    said = cluster.jobs(
        *("submit", "--runtime-env-json", json.dumps({"env_vars": environment}), "--entrypoint-num-cpus", "0", "--"),
        *(sys.executable, str(script), str(tmp_path), str(tiny_base)),
    )
    found = json.loads(next(line for line in said.splitlines() if "found {" in line).partition("found ")[2])
    assert found["same"] and found["nodes"] == 2
    assert found["blobs"] > CHAPTERS


def test_a_single_machine_needs_no_engine(workspace: Path) -> None:
    assert mapper_for(load_settings()) is map
