"""An adapter on a hub, with a model card written from its manifest."""

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
    """What a stranger should know of an adapter: data, recipe, metrics, lineage. Markdown with the hub's front matter.

    Args:
        manifest: of the adapter.
        evaluation: `models` and `verdict` of its last evaluation; None if it is not there any more.
    """
    base = manifest.recipe["base"]
    on_hub = base["source"] == "hub"
    front = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "ft_dagster"]}
    front |= {"base_model": base["model"]} if on_hub else {}
    chapters = chapters_of(manifest)
    trained, kept = ([item for item in chapters if item.trained_on], [item for item in chapters if item.held_out])
    lora, training = manifest.recipe["lora"], manifest.recipe["training"]
    number_format = manifest.number_format or base["dtype"]
    held_as = base["quantization"] if base["quantization"] != "none" else number_format
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# A LoRA adapter for {base['model']}",
        f"Made by ft_dagster {manifest.package} from {len(trained)} chapters of reports, and measured on {len(kept)} "
        "that were held out, in whole or in part.",
        "## Base",
        f"{manifest.base['name']}, revision `{manifest.revision}`. Hash of its weights: `{manifest.base['weights']}`; "
        f"of its tokenizer: `{manifest.base['tokenizer']}`. On another base its output means nothing.",
        "## Data",
        f"Dataset `{manifest.dataset}`. The SHA-256 of every file stands in `{MANIFEST}`.",
        "| chapter | texts trained on | |\n|---|---|---|\n"
        + "\n".join(f"| {c.chapter} | {c.trained_on} | {'held out' if c.held_out else ''} |" for c in chapters),
        "## Recipe",
        f"`{manifest.recipe['name']}`: rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, "
        f"{training['epochs']:g} epochs, learning rate {training['learning_rate']:g}, base held as "
        f"{held_as}. Every field: `{MANIFEST}`.",
        *_metrics(evaluation),
        "## Lineage",
        f"Adapter `{manifest.key}`, step {manifest.step}, "
        + (f"went on from `{manifest.started_from}`." if manifest.started_from else "trained from the base.")
        + f" Training code {manifest.code}; {', '.join(f'{n} {v}' for n, v in manifest.libraries.items())}.",
    ]
    return "\n\n".join(lines) + "\n"


def _metrics(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return []
    verdict = evaluation["verdict"]
    rows = [
        f"| {rule['name']} | {rule['measured']:.4f} | {rule['sense']} {rule['threshold']:g} | "
        f"{'yes' if rule['passed'] else 'no'} |"
        for rule in verdict["rules"]
    ]
    scores = ", ".join(f"{name} {model['bits_per_byte']:.4f}" for name, model in evaluation["models"].items())
    return [
        "## Measured",
        f"Bits per byte on held-out chapters: {scores}. Verdict: {verdict['decision']}.",
        "| rule | measured | asked | passed |\n|---|---|---|---|\n" + "\n".join(rows),
    ]


def publish(folder: Path, manifest: Manifest, card: str, repository: str, api: Any, private: bool) -> str:
    """Upload an adapter's files and its card to a hub repository, in one commit.

    Args:
        folder: the adapter's.
        manifest: its manifest; the files are checked against it.
        card: from `model_card`.
        repository: owner/name; made if it is not there.
        api: a huggingface_hub.HfApi, with the token.
        private: whether the repository must be private.

    Returns:
        The commit's address.

    Raises:
        AdapterError: a file is not what was saved.
        ReleaseError: the hub refuses or cannot be reached, or the repository is public and should be private.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    check_files(folder, manifest)
    operations = [CommitOperationAdd(CARD, card.encode())]
    operations += [CommitOperationAdd(name, folder / name) for name in published_files(manifest)]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ReleaseError(f"{repository} is there already, and public. Add --public if it shall be.")
        commit = api.create_commit(repository, operations, commit_message=f"Adapter {manifest.key[:12]}")
    except HfHubHTTPError as error:
        raise ReleaseError(
            f"The hub refuses {repository}: {redacted(error.server_message or type(error).__name__)}."
        ) from None
    except ReleaseError:
        raise
    except Exception as error:  # the client lets its transport's errors through, which share no class of its own
        raise ReleaseError(
            f"{repository} cannot be published: {type(error).__name__}. It must read owner/name, and the hub must be "
            "reachable."
        ) from error
    return str(commit.commit_url)


def published_files(manifest: Manifest) -> list[str]:
    """What goes to a hub beside the card."""
    return sorted([*(name for name in manifest.files if name != CARD), MANIFEST])
