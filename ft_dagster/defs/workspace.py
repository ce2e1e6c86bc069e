"""The workspace as a Dagster resource: settings, recipe, store, releases."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from pydantic import PrivateAttr

from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.settings import Settings, load_settings
from ft_dagster.defs.runs.run_host import record_host
from ft_dagster.release.released import Releases
from ft_dagster.store import formats
from ft_dagster.store.local import Store
from ft_dagster.store.shared import open_store

GROUP = "ft_dagster"
"""One group for all assets, because the UI shows several groups collapsed."""
OWNERS = ["team:reports"]
GPU_POOL = "gpu"
"""The pool of the steps that train and evaluate."""


class Workspace(dg.ConfigurableResource):
    """The folder of one body of reports, and what is made of them. Each step reads FT_WORKSPACE and `.env` again."""

    _settings: Settings | None = PrivateAttr(None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["Workspace"]:
        """Keep the store from being cleaned while the steps of a run execute."""
        if context.instance and context.run and self.settings.executor == "local":  # else steps run elsewhere
            record_host(context.instance, context.run)
        settings, store = self.settings, self.store
        formats.mark(settings.state, formats.STATE)
        if store.url is None:
            formats.mark(store.root, formats.STORE)
        with store.in_use():
            yield self

    @property
    def settings(self) -> Settings:
        """The settings, read once for each step, each look of the sensor and each command."""
        if self._settings is None:
            self._settings = load_settings()
        return self._settings

    @property
    def recipe(self) -> Recipe:
        settings = self.settings
        return load_recipe(settings.recipe, settings.workspace)

    @property
    def store(self) -> Store:
        return open_store(self.settings)

    @property
    def releases(self) -> Releases:
        settings = self.settings
        return Releases(settings.fine_tuned_model, settings.state)
