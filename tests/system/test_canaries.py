"""All secrets are planted at once and reach no log, event, row, object, file, message or process list."""

import gzip
import json
import os
import shutil
import zlib
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from buckets import KEY_ID, SECRET_KEY, SESSION_TOKEN
from canaries import Watched, echoing, files_with, processes_watched, rows_with, secrets_in, spellings
from commands import as_process
from dagster_dev import DagsterDev
from dagster_ui import graphql
from graphs import run
from postgres import PASSWORD, Database, serving_postgres
from processes import free_port

from ft_dagster.config.redaction import OF_THE_BUCKET
from ft_dagster.config.settings import load_settings
from ft_dagster.defs.instance import open_instance
from ft_dagster.store.bucket import Bucket

TOKEN = "hf_canaryOfTheHub0123456789"
OF_MLFLOW = "canary/of+mlflow@0123"
SECRETS = {
    "HUGGINGFACE_TOKEN": TOKEN,
    "MLFLOW_TRACKING_URI": OF_MLFLOW,
    "DAGSTER_POSTGRES_PASSWORD": PASSWORD,
    "AWS_ACCESS_KEY_ID": KEY_ID,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_SESSION_TOKEN": SESSION_TOKEN,
}
HUB_BASE = {"source": "hub", "model": "owner/model", "revision": "0123456789abcdef0123456789abcdef01234567"}
_EVENTS = """{{ logsForRun(runId: "{run}", limit: 1000) {{ ... on EventConnection {{ events {{
  ... on MessageEvent {{ message eventType }}
  ... on DisplayableEvent {{ label description metadataEntries {{ label description
    ... on TextMetadataEntry {{ text }} ... on MarkdownMetadataEntry {{ mdStr }} ... on PathMetadataEntry {{ path }}
    ... on JsonMetadataEntry {{ jsonString }} ... on UrlMetadataEntry {{ url }} }} }}
  ... on ErrorEvent {{ error {{ message stack errorChain {{ error {{ message stack }} }} }} }} }} }} }} }}"""
_RUNS = (
    "{ instance { info } runsOrError { ... on Runs { results { runId status runConfigYaml tags { key value } } } } }"
)


@dataclass
class Planted:
    """A workspace whose environment contains every secret, and all output of its commands."""

    folder: Path
    database: Database
    store: str
    refusing: str
    """The address of a server that quotes what it is sent."""
    said: list[str] = field(default_factory=list)

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    def ft_dagster(self, *arguments: str, code: int = 0, says: str = "") -> None:
        done = as_process(*arguments)
        self.said.append(done.stdout + done.stderr)
        assert done.returncode == code and says in done.stdout + done.stderr, (arguments, done.stdout + done.stderr)

    def change_recipe(self, change: Callable[[dict[str, Any]], Any]) -> None:
        path = self.workspace / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text())
        change(recipe)
        path.write_text(yaml.safe_dump(recipe))


@pytest.fixture
def planted(
    finished: Path, tiny_base: Path, tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Planted]:
    """Return a workspace with the reports and recipe of the finished one, and nothing that was made of them."""
    workspace = tmp_path / "workspace"
    shutil.copytree(finished / "workspace" / "chapter_markdowns", workspace / "chapter_markdowns")
    shutil.copy(finished / "workspace" / "recipe.yaml", workspace)
    with serving_postgres() as server, echoing() as refusing:
        database = server.new_database()
        tracking = f"http://reporter:{OF_MLFLOW.replace('/', '%2F').replace('@', '%40')}@{refusing}"
        settings = {
            **database.environment,
            "FT_WORKSPACE": str(workspace),
            "FT_RECIPE": "recipe.yaml",
            "FT_CACHE": str(tmp_path / "cache"),
            "FT_STORE": s3_url,
            "DAGSTER_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": f"http://{refusing}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "HOME": str(tmp_path / "user"),
            "HUGGINGFACE_TOKEN": TOKEN,
            "MLFLOW_TRACKING_URI": tracking,
        }
        (tmp_path / "user").mkdir()
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("FT_THREADS", raising=False)
        yield Planted(tmp_path, database, s3_url, refusing)


def instead(planted: Planted, patch: pytest.MonkeyPatch) -> None:
    """Put the secrets into `.env`, even those that are not read from it, and take two out of the environment."""
    lines = [f"{name}='{os.environ.get(name, secret)}'" for name, secret in SECRETS.items()]
    (planted.workspace / ".env").write_text("\n".join(lines) + "\n")
    for name in ("HUGGINGFACE_TOKEN", "MLFLOW_TRACKING_URI"):
        patch.delenv(name)


def everything_fails(planted: Planted, patch: pytest.MonkeyPatch) -> None:
    """Cause one failure after the other, each with an error that could quote a secret."""
    chapter, recipe = planted.workspace / "chapter_markdowns" / "chapter_1.md", planted.workspace / "recipe.yaml"
    text, asked = chapter.read_text(), recipe.read_text()
    planted.change_recipe(lambda content: content.update(tokens={"block_size": 1}))
    planted.ft_dagster("run", code=1, says="recipe.yaml")
    recipe.write_text(asked)

    chapter.write_bytes((text + "The café was closed.").encode("latin-1"))
    planted.ft_dagster("run", code=1, says="every_file_is_readable failed")
    chapter.write_text(text)

    planted.change_recipe(lambda content: content["training"].update(learning_rate=1e30, warmup=0.0))
    planted.ft_dagster("run", code=1, says="lora_adapter failed")
    recipe.write_text(asked)

    planted.change_recipe(lambda content: content.update(base=HUB_BASE))
    planted.ft_dagster("run", code=1, says="tokenized_dataset failed: ")
    planted.ft_dagster("doctor")
    recipe.write_text(asked)
    planted.ft_dagster("release", "push", "owner/model", "--yes", code=1, says="owner/model")
    planted.ft_dagster("track", code=1, says="MLflow was not updated")

    with patch.context() as away:
        away.setenv("AWS_ENDPOINT_URL", f"http://{planted.refusing}")
        planted.ft_dagster("run", code=1, says=f"The store {planted.store} cannot be used")
        planted.ft_dagster("doctor", code=1, says="cannot be used")
        with open_instance(load_settings()) as instance:  # within a run, whose events Dagster keeps
            assert not run(instance, "raw_chapters").success
        away.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        planted.ft_dagster("plan", code=1, says=f"The store {planted.store} cannot be used")
    with patch.context() as away:
        away.setenv("DAGSTER_POSTGRES_PORT", str(free_port()))
        planted.ft_dagster("plan", code=1, says="The history in PostgreSQL cannot be opened")


def shown_by_the_ui(planted: Planted) -> str:
    """Return what the UI shows of the instance, all runs and their events, after the daemon has scanned the reports."""
    with DagsterDev(planted.folder, **dev_settings(planted)) as dev:
        dev.until_up_to_date()
        answers = [graphql(dev.address, _RUNS)]
        for one in answers[0]["runsOrError"]["results"]:
            answers.append(graphql(dev.address, _EVENTS.format(run=one["runId"])))
        answers.append([tick.skipped for tick in dev.ticks_since(0)])
    return json.dumps(answers)


def dev_settings(planted: Planted) -> dict[str, str]:
    kept = ("FT_STORE", "HF_ENDPOINT", *SECRETS)
    return planted.database.environment | {name: os.environ[name] for name in kept if name in os.environ}


def leaks(planted: Planted, watched: Watched, *shown: str) -> dict[str, Any]:
    """Return the places where a secret can be read, and which secret it is."""
    found = {
        **files_with(planted.folder, SECRETS, except_for=[planted.workspace / ".env"]),
        **{f"table {name}": names for name, names in rows_with(planted.database.tables(), SECRETS).items()},
    }
    for name, data in Bucket(planted.store).read_many(Bucket(planted.store).list("")).items():
        found[f"object {name}"] = secrets_in(data, SECRETS)
    for name, texts in (
        ("said", planted.said),
        ("UI", shown),
        ("ps", watched.commands.values()),
        ("PostgreSQL", [planted.database.server.log]),
    ):
        found |= {f"{name} {number}": secrets_in(text.encode(), SECRETS) for number, text in enumerate(texts)}
    return {place: names for place, names in found.items() if names}


def test_no_secret_is_written_logged_or_shown_in_success_or_failure(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with processes_watched(planted.workspace, SECRETS) as watched:
        planted.ft_dagster("run", "--json", says="bits_per_byte")
        with monkeypatch.context() as patch:
            instead(planted, patch)
            planted.ft_dagster("plan", says="Nothing to do")
            planted.ft_dagster("doctor", says="HUGGINGFACE_TOKEN")
            planted.ft_dagster("lineage", "show")
            planted.ft_dagster("release", "push", "owner/model", says="Would go to owner/model")
            planted.ft_dagster("track", code=1, says="MLflow was not updated")
        everything_fails(planted, monkeypatch)
        planted.ft_dagster("run")
        shown = shown_by_the_ui(planted)
    assert "PostgresEventLogStorage" in shown and "tokenized_dataset" in shown and "FAILURE" in shown
    assert leaks(planted, watched, shown) == {}
    assert watched.given_to("ft_dagster.training") == set(OF_THE_BUCKET) & set(SECRETS), "for its checkpoints"
    assert watched.given_to("ft_dagster.evaluation") == set()
    assert watched.given_to("ft_dagster.model.inspection") == set()


@pytest.mark.parametrize("secret", [OF_MLFLOW, SECRET_KEY, PASSWORD])
def test_the_search_finds_a_secret_however_it_is_spelled(secret: str, tmp_path: Path) -> None:
    def wrapped(text: str) -> list[bytes]:
        return [text.encode(), quote(text, safe="").encode(), json.dumps(text).encode(), text.encode().hex().encode()]

    spelled = [form for before in ("", "a", "ab", "user:") for form in wrapped(f"{before}{secret} and more")]
    spelled += [
        encode(f"{b}{secret}{a}".encode())
        for encode in (b64encode, urlsafe_b64encode)
        for b in ("", "a", "ab")
        for a in ("", "z", "zz")
    ]
    spelled += [gzip.compress(spelled[0]), zlib.compress(spelled[0])]
    assert len(spellings(secret)) > 3
    for number, data in enumerate(spelled):
        (tmp_path / f"file {number}").write_bytes(b"before" + data if data[:1] not in b"\x1f\x78" else data)
    assert len(files_with(tmp_path, {"it": secret})) == len(spelled)
    rows = {"bytes": f"(1,\\x{zlib.compress(spelled[0]).hex()},2)", "text": f"(1,{secret})", "none": "(1,2)"}
    assert rows_with(rows, {"it": secret}) == {"bytes": {"it"}, "text": {"it"}}
