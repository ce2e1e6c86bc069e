"""The definitions that `dagster dev` loads."""

import subprocess
import sys
import tomllib
from pathlib import Path

import dagster as dg
import yaml

from ft_dagster.definitions import defs
from ft_dagster.defs.stages import STAGES

PROJECT = Path(__file__).parents[1]


def test_the_graph_matches_the_design() -> None:
    graph = defs.resolve_asset_graph()
    parents = {
        key.to_user_string(): {p.to_user_string() for p in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert parents == {
        "report_files": set(),
        "base_model": set(),
        "raw_chapters": {"report_files"},
        "sections": {"raw_chapters"},
        "tokenized_dataset": {"sections", "base_model"},
        "lora_adapter": {"tokenized_dataset", "base_model"},
        "adapter_evaluation": {"lora_adapter", "tokenized_dataset"},
        "released_adapter": {"adapter_evaluation"},
    }


def test_stages_and_assets_agree_on_parents_and_code_versions() -> None:
    graph = defs.resolve_asset_graph()
    for stage in STAGES:
        assert graph.get(stage.key).parent_keys == set(stage.parents)
        assert graph.get(stage.key).code_version == stage.code_version


def test_every_asset_is_described_owned_and_in_one_group() -> None:
    for spec in defs.resolve_all_asset_specs():
        assert spec.description and spec.owners and spec.kinds, spec.key
        assert spec.group_name == "ft_dagster"


def test_every_stage_leads_to_the_lines_of_code_that_make_it() -> None:
    graph = defs.resolve_asset_graph()
    for stage in STAGES:
        (reference,) = graph.get(stage.key).metadata["dagster/code_references"].value.code_references
        source = Path(reference.file_path).read_text().splitlines()[reference.line_number - 1 :]
        lines = (line.strip() for line in source)
        assert next(line for line in lines if line.startswith("def ")).startswith(f"def {stage.name}(")


def test_training_and_evaluation_wait_for_the_gpu_pool_and_nothing_else_does() -> None:
    pools = {
        asset.key.to_user_string(): asset.op.pool
        for asset in defs.assets or []
        if isinstance(asset, dg.AssetsDefinition)
    }
    assert {name for name, pool in pools.items() if pool == "gpu"} == {"lora_adapter", "adapter_evaluation"}


def test_loading_the_definitions_imports_no_torch() -> None:
    code = (
        "import sys, ft_dagster.definitions; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_workspace_yaml_and_pyproject_name_the_same_single_location() -> None:
    (entry,) = yaml.safe_load((PROJECT / "workspace.yaml").read_text())["load_from"]
    tool = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["dagster"]
    assert entry["python_module"] == {
        "module_name": tool["module_name"],
        "location_name": tool["code_location_name"],
    }
