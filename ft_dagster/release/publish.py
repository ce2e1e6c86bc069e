"""Publish an adapter on a hub, with a model card that is written from its manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ft_dagster.config.redaction import redacted
from ft_dagster.model.manifest import MANIFEST, Manifest, check_files
from ft_dagster.release.lineage import chapters_of
from ft_dagster.release.released import ReleaseError

CARD = "README.md"


def model_card(manifest: Manifest, evaluation: Mapping[str, Any] | None) -> str:
    """Return the model card of an adapter: data, recipe, metrics and lineage, as Markdown with the hub's front matter.

    Args:
        manifest: manifest of the adapter.
        evaluation: `models` and `verdict` of its last evaluation; None if it no longer exists.
    """
    base = manifest.recipe["base"]
    on_hub = base["source"] == "hub"
    front = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "ft_dagster"]}
    front |= {"base_model": base["model"]} if on_hub else {}
    chapters = chapters_of(manifest)
    trained, kept = ([item for item in chapters if item.trained_on], [item for item in chapters if item.held_out])
    lora, training = manifest.recipe["lora"], manifest.recipe["training"]
    number_format = manifest.number_format or base["dtype"]
    loaded_as = base["quantization"] if base["quantization"] != "none" else number_format
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# A LoRA adapter for {base['model']}",
        f"Made by ft_dagster {manifest.package} from {len(trained)} chapters of reports, "
        + (
            f"after the adapter `{manifest.refit_of}` had passed the gate without the held-out ones among them."
            if manifest.refit_of
            else f"and evaluated on {len(kept)} chapters that were held out, completely or in part."
        ),
        "## Base",
        f"{manifest.base['name']}, revision `{manifest.revision}`. Hash of its weights: `{manifest.base['weights']}`; "
        f"of its tokenizer: `{manifest.base['tokenizer']}`. On another base model, its output is meaningless.",
        "## Data",
        f"Dataset `{manifest.dataset}`. The SHA-256 of every file is in `{MANIFEST}`.",
        "| chapter | texts trained on | |\n|---|---|---|\n"
        + "\n".join(f"| {c.chapter} | {c.trained_on} | {'held out' if c.held_out else ''} |" for c in chapters),
        "## Recipe",
        f"`{manifest.recipe['name']}`: rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, "
        f"{training['epochs']:g} epochs, learning rate {training['learning_rate']:g}, base loaded as "
        f"{loaded_as}. All fields are in `{MANIFEST}`.",
        *_metrics(evaluation, manifest.refit_of),
        "## Lineage",
        f"Adapter `{manifest.key}`, step {manifest.step}, "
        + (f"continued from `{manifest.started_from}`." if manifest.started_from else "trained from the base.")
        + f" Training code {manifest.code}; {', '.join(f'{n} {v}' for n, v in manifest.libraries.items())}.",
    ]
    return "\n\n".join(lines) + "\n"


def _metrics(evaluation: Mapping[str, Any] | None, refit_of: str) -> list[str]:
    if evaluation is None:
        return []
    verdict = evaluation["verdict"]
    rows = [
        f"| {rule['name']} | {rule['measured']:.4f} | {rule['sense']} {rule['threshold']:g} | "
        f"{'yes' if rule['passed'] else 'no'} |"
        for rule in verdict["rules"]
    ]
    rows += [f"| {name} | not measured: {reason} | | |" for name, reason in verdict.get("not_measured", {}).items()]
    scores = ", ".join(f"{name} {model['bits_per_byte']:.4f}" for name, model in evaluation["models"].items())
    return [
        f"## Measured on `{refit_of}`" if refit_of else "## Measured",
        f"Bits per byte on held-out chapters: {scores}. Verdict: {verdict['decision']}.",
        "| rule | measured | required | passed |\n|---|---|---|---|\n" + "\n".join(rows),
    ]


def publish(folder: Path, manifest: Manifest, card: str, repository: str, api: Any, private: bool) -> str:
    """Upload an adapter's files and its card to a hub repository, in one commit.

    Args:
        folder: folder of the adapter.
        manifest: its manifest, against which the files are checked.
        card: its model card, from `model_card`.
        repository: owner/name; created if it does not exist.
        api: a huggingface_hub.HfApi, with the token.
        private: whether the repository must be private.

    Returns:
        The URL of the commit.

    Raises:
        AdapterError: a file differs from the one that was saved.
        ReleaseError: the hub refuses or cannot be reached, or the repository is public although it must be private.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    check_files(folder, manifest)
    operations = [CommitOperationAdd(CARD, card.encode())]
    operations += [CommitOperationAdd(name, folder / name) for name in published_files(manifest)]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ReleaseError(f"{repository} already exists and is public. Add --public if that is intended.")
        commit = api.create_commit(repository, operations, commit_message=f"Adapter {manifest.key[:12]}")
    except HfHubHTTPError as error:
        raise ReleaseError(
            f"The hub refuses {repository}: {redacted(error.server_message or type(error).__name__)}."
        ) from None
    except ReleaseError:
        raise
    except Exception as error:  # errors of the client's transport have no class in common
        raise ReleaseError(
            f"{repository} cannot be published: {type(error).__name__}. The name must have the form owner/name, and "
            "the hub must be reachable."
        ) from error
    return str(commit.commit_url)


def published_files(manifest: Manifest) -> list[str]:
    """Return the names of the files that are uploaded in addition to the card."""
    return sorted([*(name for name in manifest.files if name != CARD), MANIFEST])
