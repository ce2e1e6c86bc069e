"""What the graph is made from but does not make: the report files and the base model."""

import dagster as dg

from ft_dagster.base import base_version
from ft_dagster.corpus.files import SourceFile, Unreadable, content_version, read_reports
from ft_dagster.defs.stages import BASE_MODEL, REPORT_FILES, data_version
from ft_dagster.defs.workspace import GROUP, OWNERS
from ft_dagster.recipe import load_recipe
from ft_dagster.settings import Settings

report_files = dg.AssetSpec(
    REPORT_FILES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"markdown", "json"},
    description="Report chapters as people and the upstream generator leave them: `chapter_markdowns/` and "
    "`outputs/consolidated/` of the workspace. Its data version is their content.",
)
base_model = dg.AssetSpec(
    BASE_MODEL,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"huggingface"},
    description="The pretrained model that the recipe names, pinned by revision or by the hash of its bytes.",
)


def current_versions(settings: Settings) -> dict[dg.AssetKey, str]:
    """Data versions of the external assets as they are now."""
    files: list[SourceFile] = []
    unreadable: list[Unreadable] = []
    for found in read_reports(settings.workspace):
        if isinstance(found, Unreadable):
            unreadable.append(found)
        else:
            files.append(found[0])
    recipe = load_recipe(settings.recipe, settings.workspace)
    return {REPORT_FILES: content_version(files, unreadable), BASE_MODEL: base_version(recipe.base)}


def changed(instance: dg.DagsterInstance, settings: Settings) -> list[dg.AssetMaterialization]:
    """An event for each external asset whose content is not the one last recorded."""
    return [
        dg.AssetMaterialization(key, tags={"dagster/data_version": version})
        for key, version in current_versions(settings).items()
        if data_version(instance, key) != version
    ]
