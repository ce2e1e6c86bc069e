"""Settings say where things are, and contain the only secret."""

from pathlib import Path

import pytest

from ft_dagster.config.settings import Settings, SettingsError, load_settings

TOKEN = "hf_thisIsTheSecretOfTheTests"


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all settings from the environment and change to an empty folder."""
    for name in ("WORKSPACE", "RECIPE", "CACHE", "STORE", "THREADS"):
        monkeypatch.delenv(f"FT_{name}", raising=False)
    for name in ("HUGGINGFACE_TOKEN", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_the_workspace_is_the_current_folder(tmp_path: Path) -> None:
    assert load_settings() == Settings(
        workspace=tmp_path, recipe="smollm2-135m", cache=tmp_path / "home/.cache/ft_dagster", store=".ft/store"
    )


def test_a_workspace_has_the_folders_of_the_original_script_and_ours(tmp_path: Path) -> None:
    settings = load_settings()
    assert {
        "fine_tuned_model": settings.fine_tuned_model,
        "logs": settings.logs,
        "offload": settings.offload,
        ".ft": settings.state,
        ".ft/store": settings.store_root,
        ".dagster": settings.dagster_home,
    } == {name: tmp_path / name for name in (
        "fine_tuned_model", "logs", "offload", ".ft", ".ft/store",
        ".dagster",
    )}  # fmt: skip


@pytest.mark.parametrize("name", ["reports", "./reports/../reports", "~/../reports"])
def test_ft_workspace_names_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / ".env").write_text("FT_RECIPE=mine.yaml\n")
    monkeypatch.setenv("FT_WORKSPACE", name)
    settings = load_settings()
    assert (settings.workspace, settings.recipe) == (tmp_path / "reports", "mine.yaml")


def test_a_workspace_behind_a_link_keeps_the_name_the_user_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("FT_WORKSPACE", "link")
    assert load_settings().workspace == tmp_path / "link"


def test_the_env_file_of_the_workspace_is_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        f"# comment\nFT_STORE=/disk/store\nFT_CACHE='~/models'\nFT_THREADS=3\nHUGGINGFACE_TOKEN={TOKEN}\nOTHER=1\n"
    )
    settings = load_settings()
    assert (settings.store_root, settings.cache) == (Path("/disk/store"), tmp_path / "home" / "models")
    assert (settings.threads, settings.token) == (3, TOKEN)


def test_the_environment_takes_precedence_over_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("FT_RECIPE=file.yaml\nFT_THREADS=3\nHUGGINGFACE_TOKEN=from_file\n")
    monkeypatch.setenv("FT_RECIPE", "environment.yaml")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", TOKEN)
    settings = load_settings()
    assert (settings.recipe, settings.threads, settings.token) == ("environment.yaml", 3, TOKEN)


def test_variables_without_a_value_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    unset = load_settings()
    for name in ("FT_WORKSPACE", "FT_RECIPE", "FT_CACHE", "FT_STORE", "FT_THREADS", "HUGGINGFACE_TOKEN"):
        monkeypatch.setenv(name, "")
    assert load_settings() == unset


def test_lines_without_a_value_are_not_set(tmp_path: Path) -> None:
    unset = load_settings()
    (tmp_path / ".env").write_text("FT_RECIPE=\nFT_CACHE=\nFT_STORE=\nFT_THREADS=\nHUGGINGFACE_TOKEN=\n")
    assert load_settings() == unset
    assert unset.token is None


def test_the_token_is_in_no_printed_or_dumped_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUGGINGFACE_TOKEN", TOKEN)
    settings = load_settings()
    assert settings.token == TOKEN
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(settings.model_dump())]
    assert [text for text in shown if TOKEN in text] == []


def test_the_token_is_not_in_the_message_of_another_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUGGINGFACE_TOKEN", TOKEN)
    monkeypatch.setenv("FT_THREADS", "none")
    with pytest.raises(SettingsError, match="FT_THREADS") as caught:
        load_settings()
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_threads_are_a_number_of_at_least_one(monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    monkeypatch.setenv("FT_THREADS", threads)
    with pytest.raises(SettingsError, match="FT_THREADS"):
        load_settings()


@pytest.mark.parametrize(("value", "expected"), [("", ".dagster"), ("/srv/dagster", "/srv/dagster"), ("~/d", "home/d")])
def test_dagster_home_takes_precedence_over_the_folder_of_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", value)
    assert load_settings().dagster_home == tmp_path / expected


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"FT_THREADS=abc", "FT_THREADS: Input should be a valid integer"), (b"FT_RECIPE=caf\xe9", "is not UTF-8 text")],
)
def test_settings_that_cannot_be_used_are_named_with_their_file(workspace: Path, content: bytes, said: str) -> None:
    (workspace / ".env").write_bytes(content)
    with pytest.raises(SettingsError, match=said) as error:
        load_settings()
    assert str(workspace / ".env") in str(error.value)


def test_a_workspace_that_is_a_file_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_WORKSPACE", str(workspace / "recipe.yaml"))
    with pytest.raises(SettingsError, match="is not a folder"):
        load_settings()


def test_dagster_home_may_be_set_in_the_env_file(workspace: Path) -> None:
    (workspace / ".env").write_text("DAGSTER_HOME=history")
    assert load_settings().dagster_home == workspace / "history"
