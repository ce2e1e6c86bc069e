"""Locations and secrets, read from the environment and from the workspace's `.env`.

The docstrings of the fields are the descriptions in docs/settings.md: Markdown, written there by `make docs`.
"""

import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ft_dagster.config.recipe_file import DEFAULT_RECIPE
from ft_dagster.errors import UserError


class SettingsError(UserError):
    """The environment or `.env` cannot be used; the message names the variable and the file."""


class Settings(BaseSettings):
    """A workspace and the locations of its parts. Create it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="FT_", env_ignore_empty=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    workspace: Path = Field(default_factory=Path.cwd)
    """The folder that contains one set of reports and everything made from them. Set it in the environment, not in
    `.env`, which is in that folder."""
    recipe: str = DEFAULT_RECIPE
    """What to train and how: the name of a shipped [recipe](recipes.md), or a YAML file, relative to the workspace."""
    cache: Path = Path("~/.cache/ft_dagster")
    """The folder for base models, shared by all workspaces, and for copies of the contents of a bucket (FT_STORE)."""
    store: str = ".ft/store"
    """Where artifacts are kept: a folder, relative to the workspace, or a bucket that [many machines
    share](storage.md), `s3://bucket/prefix`."""
    executor: Literal["local", "ray", "k8s"] = "local"
    """Where steps run: on this machine, or on [an engine for many](gpus.md)."""
    ray_address: str = "http://127.0.0.1:8265"
    """With `FT_EXECUTOR=ray`: the dashboard of the cluster's head, which takes [Ray's jobs](ray.md)."""
    ray_gpus: float = Field(default=1.0, ge=0)
    """GPUs that each training process, and an evaluation, requests from Ray; 0: they compute on CPUs."""
    ray_patience_seconds: float = Field(default=120.0, gt=0)
    """Seconds after which a step fails if the head does not answer, or if its job has ended without reporting a
    result."""
    k8s: Path | None = None
    """With `FT_EXECUTOR=k8s`: a YAML file, relative to the workspace, that describes the [pods of
    steps](kubernetes.md); defaults when not set."""
    watch_seconds: int = Field(default=15, ge=1)
    """How often the UI's daemon looks at the reports, in seconds. Dagster's daemon ticks every 5 seconds at most."""
    settle_seconds: float = Field(default=10.0, ge=0)
    """Seconds without a change after which an automatic run starts, so that a burst of edits makes one training."""
    minimum_interval_seconds: float = Field(default=0.0, ge=0)
    """Minimum seconds from the start of one automatic run to the start of the next."""
    lag_seconds: float = Field(default=3600.0, gt=0)
    """Seconds that the released adapter may be out of date before the UI shows it as overdue, in red."""
    keep_adapters: int = Field(default=5, ge=1)
    """How many of the newest adapters `ft-dagster clean` keeps, with everything they were made from."""
    keep_released: bool = True
    """Whether `ft-dagster clean` keeps every adapter that was ever released."""
    keep_runs: int | None = Field(default=None, ge=1)
    """How many of the last runs `ft-dagster clean` keeps in Dagster's history; all of them when not set."""
    schedule: str | None = None
    """A cron line for scheduled retraining, such as `0 3 * * *`, which runs only what is stale; off when not set."""
    threads: int | None = Field(default=None, ge=1)
    """Threads that training and evaluation use on a CPU; all cores when not set."""
    huggingface_token: Annotated[SecretStr | None, NoDecode] = Field(default=None, validation_alias="HUGGINGFACE_TOKEN")
    """For gated base models. Handed to the hub client, for the download and for `ft-dagster release push`, and to
    nothing else."""
    mlflow_tracking_uri: SecretStr | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI")
    """An MLflow server that [logs every adapter](tracking.md); none when not set. It may contain a password."""
    mlflow_experiment_name: str | None = Field(default=None, validation_alias="MLFLOW_EXPERIMENT_NAME")
    """Name of the experiment and of the registered model in MLflow; the name of the workspace's folder when not set."""
    home: Path | None = Field(default=None, validation_alias="DAGSTER_HOME")
    """Where Dagster keeps its history; the workspace's `.dagster/` when not set."""

    @field_validator("workspace", "cache", mode="after")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - keeps symbolic links as the user wrote them

    @field_validator("store", mode="after")
    @classmethod
    def _without_credentials(cls, store: str) -> str:
        if "://" in store:
            parts = urlsplit(store)
            if "@" in parts.netloc or parts.query:
                raise ValueError(
                    "a URL holds no credentials: put them into the environment (AWS_ACCESS_KEY_ID, "
                    "AWS_SECRET_ACCESS_KEY) or into ~/.aws, and write s3://bucket/prefix"
                )
            if not parts.netloc:
                raise ValueError("the URL names no bucket: write s3://bucket/prefix")
        return store

    @property
    def token(self) -> str | None:
        """The hub token in the clear, for the hub client only."""
        return self.huggingface_token.get_secret_value() if self.huggingface_token else None

    @property
    def fine_tuned_model(self) -> Path:
        return self.workspace / "fine_tuned_model"

    @property
    def logs(self) -> Path:
        return self.workspace / "logs"

    @property
    def offload(self) -> Path:
        return self.workspace / "offload"

    @property
    def state(self) -> Path:
        """The folder `.ft/`: the store, attempts, locks, released adapters."""
        return self.workspace / ".ft"

    @property
    def index(self) -> Path:
        """The database of the report files' status and contents."""
        return self.state / "files.db"

    @property
    def pins(self) -> Path:
        """The file of chapters whose side of the split was not decided by their hash."""
        return self.state / "held_out.json"

    @property
    def speeds(self) -> Path:
        """The folder of speeds and memory measured by trainings on this machine."""
        return self.state / "speeds"

    @property
    def store_url(self) -> str | None:
        """The URL of the bucket that contains the artifacts; None if they are in a folder."""
        return self.store if "://" in self.store else None

    @property
    def store_root(self) -> Path:
        """The folder that contains the artifacts if there is no `store_url`. `open_store` opens either."""
        return self.workspace / Path(self.store).expanduser()

    @property
    def dagster_home(self) -> Path:
        """DAGSTER_HOME if it is set, otherwise the workspace's `.dagster/`."""
        return self.workspace / (self.home.expanduser() if self.home else ".dagster")


def load_settings(workspace: str | os.PathLike[str] | None = None) -> Settings:
    """Load the settings of a workspace: by default, of the one that FT_WORKSPACE names, or of the current folder.

    A variable of the environment takes precedence over `.env`; an empty one counts as not set.

    Raises:
        SettingsError: a variable has an invalid value, or the workspace or `.env` cannot be used.
    """
    workspace = Path(workspace or os.environ.get("FT_WORKSPACE") or Path.cwd()).expanduser()
    if workspace.exists() and not workspace.is_dir():
        raise SettingsError(f"The workspace {workspace} is not a folder. Name a folder with FT_WORKSPACE.")
    file = workspace / ".env"
    try:
        return Settings(_env_file=file, workspace=workspace)  # type: ignore[call-arg]
    except ValidationError as error:
        problems = "; ".join(f"{variable(problem['loc'][0])}: {problem['msg']}" for problem in error.errors())
        raise SettingsError(f"{problems}. Fix it in the environment or in {file}.") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} is not UTF-8 text: {error}. Save it again as UTF-8.") from None


def variable(field: str | int) -> str:
    """Return the name of the environment variable from which a field is read."""
    known = Settings.model_fields.get(str(field))
    if known is None or known.validation_alias:
        return str(known.validation_alias if known else field)
    return f"FT_{str(field).upper()}"
