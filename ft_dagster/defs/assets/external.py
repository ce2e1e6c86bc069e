"""The external assets, which the graph reads but does not make: the report files and the base model."""

import dagster as dg

from ft_dagster.base.prepare import base_version
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.index import Scan, scan_reports
from ft_dagster.defs.stages import BASE_MODEL, REPORT_FILES, data_version
from ft_dagster.defs.workspace import GROUP, OWNERS

report_files = dg.AssetSpec(
    REPORT_FILES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"markdown", "json"},
    description="Report chapters as people and the upstream generator write them, in `chapter_markdowns/` and "
    "`outputs/consolidated/` of the workspace. The data version is a hash of their names and contents.",
)
base_model = dg.AssetSpec(
    BASE_MODEL,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"huggingface"},
    description="The pretrained model that the recipe names, pinned by revision or by the hash of its bytes.",
)


def look(settings: Settings) -> Scan:
    """Scan the report files. Files that have not changed since the last scan are not read."""
    return scan_reports(settings.workspace, settings.index)


def record(instance: dg.DagsterInstance, scan: Scan, recipe: Recipe) -> None:
    """Record the data versions of the external assets, with one event for each that has changed since the last one."""
    record_versions(instance, scan.version, recipe)


def record_versions(instance: dg.DagsterInstance, reports: str, recipe: Recipe) -> None:
    """Do the same as `record`, for a data version of the report files that is already known."""
    for key, version in ((REPORT_FILES, reports), (BASE_MODEL, base_version(recipe.base))):
        if data_version(instance, key) != version:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(key, tags={"dagster/data_version": version}, metadata={"version": version})
            )
