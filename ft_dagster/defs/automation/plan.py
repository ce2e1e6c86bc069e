"""What a run would do now, and why: its chapters, stages, tokens, steps and time. Planning changes nothing.

Where little text changed, the light stages are executed in a dry run, in a temporary folder, so that the plan knows
what the run will find: for example that an edit changes no token, or that its adapter was made before. Where much
changed, the figures are estimated from the number of bytes, and marked as estimates.
"""

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from ft_dagster.base.model_folder import PreparedBase
from ft_dagster.base.prepare import base_version, local_base
from ft_dagster.config.recipe import Recipe
from ft_dagster.config.recipe_file import RecipeError
from ft_dagster.config.settings import Settings
from ft_dagster.corpus.chapter import natural_key
from ft_dagster.corpus.files import CorpusError, SourceFile, require_reports
from ft_dagster.corpus.index import Scan, scan_reports
from ft_dagster.corpus.ledger import LedgerError
from ft_dagster.corpus.sections import all_chapters, make_sections
from ft_dagster.corpus.snapshot import is_snapshot, keep_contents, snapshot_files, write_snapshot
from ft_dagster.dataset.dataset import make_dataset, outline_sections
from ft_dagster.dataset.held_out.near_copies import BLOCKING_SHARE, how_known
from ft_dagster.dataset.held_out.record import Split, read_pinned
from ft_dagster.dataset.sides import next_split
from ft_dagster.defs.automation.cost import TrainingCost, training_cost
from ft_dagster.defs.automation.refusals import Refusal, refusals_in, refusals_without_parsing
from ft_dagster.defs.automation.token_estimate import bytes_per_token
from ft_dagster.defs.stages import (
    ADAPTER_EVALUATION,
    BASE_MODEL,
    BLOCKED,
    LORA_ADAPTER,
    RAW_CHAPTERS,
    RELEASED_ADAPTER,
    REPORT_FILES,
    SECTIONS,
    STAGES,
    TOKENIZED_DATASET,
    Materializations,
    Reason,
    Stage,
    all_materializations,
    input_version,
    last_artifact,
    stale_among,
    version_of,
)
from ft_dagster.defs.workspace import Workspace
from ft_dagster.model.manifest import MANIFEST
from ft_dagster.store.dry_run import DryRunStore
from ft_dagster.store.local import Artifact
from ft_dagster.training.find_or_train import made_before
from ft_dagster.training.request import WEIGHTS
from ft_dagster.training.sizing.steps import few_steps_advice, optimizer_steps

_DRY_RUN_BYTES = 2_000_000
"""The largest amount of changed text for a dry run. To parse and tokenize more takes longer than a person waits for a
plan, so the figures are estimated."""
_LIGHT = (RAW_CHAPTERS, SECTIONS, TOKENIZED_DATASET)
_ALL_REPORTS = "the reports"
"""What is named if not a single file stops a run, but all reports together."""
_REMAKE_ALL = ("recipe", "base", "code", "missing")
"""Kinds of reasons for which a light stage makes everything again, not only what changed."""


@dataclass(frozen=True)
class ChapterChange:
    """A chapter that differs from its version in the last snapshot of the reports."""

    chapter: str
    words: int
    """The current number of words; the previous one if the chapter was removed."""
    words_before: int = 0


@dataclass(frozen=True)
class StagePlan:
    """One stage that a run would bring up to date."""

    stage: str
    kind: str
    """`content`, `recipe`, `base`, `code`, `missing`, `blocked`, or `upstream` (a stage above may change)."""
    reason: str
    outcome: str
    """`runs`, `unchanged` (it runs, and its content will be the same), `reused` (the store already has its result),
    `blocked` (an unreadable file, or text that looks like a key, stops the run here), or `if needed` (it depends on
    the stages before it)."""


@dataclass
class Plan:
    """What `ft-dagster run` would do now."""

    added: list[ChapterChange] = field(default_factory=list)
    edited: list[ChapterChange] = field(default_factory=list)
    removed: list[ChapterChange] = field(default_factory=list)
    stages: list[StagePlan] = field(default_factory=list)
    exact: bool = True
    """Whether the figures were counted; otherwise they are estimates."""
    at_most: bool = False
    """Whether training may end earlier, or cover fewer rows, than the figures say (`training.patience`, and
    `training.start: last`)."""
    refused: list[Refusal] = field(default_factory=list)
    """Files, and texts in them, for which the run stops before training."""
    advice: str | None = None
    """What to change if the training has too few optimizer steps to learn much."""
    trains: bool = False
    train_tokens: int | None = None
    """Number of training tokens per epoch."""
    train_chapters: int | None = None
    """Number of chapters that are trained on, wholly or in part. None without a dry run, or where the run stops before
    training."""
    held_out: list[str] = field(default_factory=list)
    """The chapters, or sections, that are held out. Empty without a dry run."""
    held_out_share: float | None = None
    """Their share of the text that is trained on or held out. None without a dry run."""
    steps: int | None = None
    """Number of optimizer steps; 0 if no training is due."""
    seconds: float | None = None
    """Estimated time of training and evaluation together, from earlier measurements. None before the first
    evaluation, where only `training.seconds` may be known, from the model's operations."""
    training: TrainingCost | None = None
    """Estimated cost of the training alone. None if none is due."""
    refit: TrainingCost | None = None
    """Estimated cost of the training on all text that follows if the gate releases a new adapter (`release.refit`).
    It is not in `seconds`. None if none is due."""

    @property
    def nothing_to_do(self) -> bool:
        return not self.stages

    def to_json(self) -> dict[str, Any]:
        changes = {name: asdict(self)[name] for name in ("added", "edited", "removed")}
        words = {name: sum(item["words"] for item in items) for name, items in changes.items()}
        return {"nothing_to_do": self.nothing_to_do, "words": words} | asdict(self)


def make_plan(
    instance: dg.DagsterInstance, workspace: Workspace, scan: Scan | None = None, *, cost: bool = True
) -> Plan:
    """Compare reports, recipe, base model, code, store and release with what was made, and return what a run would do.

    Args:
        instance: the Dagster instance, which records what was made.
        workspace: the workspace to plan for.
        scan: the scanned reports; by default they are scanned now, without updating the index.
        cost: whether to estimate the time and memory of a training.

    Raises:
        CorpusError: there are no reports.
    """
    settings, recipe = workspace.settings, workspace.recipe
    scan = scan or scan_reports(settings.workspace, settings.index, remember=False)
    require_reports(settings.workspace, len(scan.files) + len(scan.unreadable))
    now = {REPORT_FILES: scan.version, BASE_MODEL: base_version(recipe.base)}
    plan = Plan()
    made = all_materializations(instance)
    before = last_artifact(made, workspace.store, RAW_CHAPTERS)
    if before and not is_snapshot(before):  # written by an earlier version
        before = None
    changed = _compare(plan, scan, before)
    stale = stale_among(made, workspace, recipe, now)
    if not stale:
        return plan
    with tempfile.TemporaryDirectory() as scratch:
        tried = None
        remakes_all = any(stage in _LIGHT and reason.kind in _REMAKE_ALL for stage, reason in stale)
        read = scan.files if remakes_all else changed
        if sum(file.size for file in read) <= _DRY_RUN_BYTES:
            tried = _DryRun(made, workspace, DryRunStore(workspace.store, Path(scratch)), now).run(scan, dict(stale))
        if tried:
            plan.stages, plan.refused = tried.stages, tried.refused
        else:
            sections = last_artifact(made, workspace.store, SECTIONS)
            current = set(scan.files)
            in_scan = [file for file in read if file in current]
            plan.refused = refusals_without_parsing(settings.workspace, scan, in_scan, sections, recipe.corpus)
            plan.stages = [_as_found(stage, reason) for stage, reason in stale]
            if plan.refused:
                first = (RAW_CHAPTERS.name, SECTIONS.name)
                plan.stages = _blocked([stage for stage in plan.stages if stage.stage in first])
        if plan.refused:
            plan.steps = 0
        else:
            plan.exact = tried is not None and tried.dataset is not None
            _count(plan, made, workspace, recipe, tried, scan, cost)
    return plan


def _as_found(stage: Stage, reason: Reason) -> StagePlan:
    return StagePlan(stage.name, reason.kind, reason.text, "if needed" if reason.kind == "upstream" else "runs")


def _compare(plan: Plan, scan: Scan, before: Artifact | None) -> list[SourceFile]:
    """Fill in the changed chapters. Return the new versions of added and edited files, and the old ones of edited and
    removed files."""
    old, new = _by_chapter(snapshot_files(before) if before else ()), _by_chapter(scan.files)
    changed = []
    names = [name for name in old.keys() | new.keys() if old.get(name, {}).keys() != new.get(name, {}).keys()]
    for name in sorted(names, key=natural_key):
        was, is_now = old.get(name, {}), new.get(name, {})
        words, words_before = (sum(file.words for file in files.values()) for files in (is_now, was))
        if not was:
            plan.added.append(ChapterChange(name, words))
        elif not is_now:
            plan.removed.append(ChapterChange(name, words_before, words_before))
        else:
            plan.edited.append(ChapterChange(name, words, words_before))
        changed += [file for key, file in is_now.items() if key not in was]
        changed += [file for key, file in was.items() if key not in is_now]
    return changed


def _by_chapter(files: Iterable[SourceFile]) -> dict[str, dict[tuple[str, str], SourceFile]]:
    """Return chapter -> (path, hash of the content) -> file."""
    chapters: dict[str, dict[tuple[str, str], SourceFile]] = defaultdict(dict)
    for file in files:
        chapters[file.chapter][file.path, file.sha256] = file
    return chapters


@dataclass(frozen=True)
class _ToTrain:
    """The text on the train side."""

    chapters: int
    size: int
    """Its size in bytes."""
    held_out: tuple[str, ...]
    """The chapters or sections that are held out."""
    held_out_size: int
    """Their size in bytes."""


@dataclass
class _Outcome:
    """The result of a dry run."""

    stages: list[StagePlan]
    dataset: Artifact | None = None
    """None if a blocking check stops the run before this stage, or the base model is not on this machine."""
    to_train: _ToTrain | None = None
    """None if a blocking check stops the run before training."""
    refused: list[Refusal] = field(default_factory=list)
    """What the blocking check would name."""


class _DryRun:
    """Runs the light stages in a temporary store."""

    def __init__(
        self, made: Materializations, workspace: Workspace, store: DryRunStore, now: Mapping[dg.AssetKey, str]
    ) -> None:
        self.made = made
        self.workspace = workspace
        self.recipe: Recipe = workspace.recipe
        self.store = store
        self.now = now
        self.stages: list[StagePlan] = []
        self.changes: set[dg.AssetKey] = set()
        """Assets whose content will change."""

    def run(self, scan: Scan, stale: Mapping[Stage, Reason]) -> _Outcome | None:
        """Return what a run would do, or None where the reports cannot be used; the run itself will report why."""
        settings = self.workspace.settings
        try:
            base = local_base(self.recipe.base, settings.cache)
            if not keep_contents(settings.workspace, scan, self.store):
                return None
            snapshot = write_snapshot(scan, self.store)
            sections = make_sections(snapshot, self.recipe.corpus)
            versions = {RAW_CHAPTERS: snapshot.about["version"], SECTIONS: sections.about["version"]}
            self.changes |= {key for key, version in self.now.items() if version_of(self.made.get(key)) != version}
            if refused := refusals_in(sections, self.recipe.corpus):
                return self._blocked(stale, versions, refused)
            tokens, objectives = self.recipe.tokens, self.recipe.objectives
            outline = outline_sections(sections)
            last = last_artifact(self.made, self.store, TOKENIZED_DATASET)
            learned = partial(self.workspace.releases.learned, self.store)
            pinned = read_pinned(settings.pins)
            try:
                split = next_split(outline, tokens, pinned, objectives, last, learned)
                to_train = _to_train(sections, split)
                if base is None:
                    return _Outcome([_as_found(stage, reason) for stage, reason in stale.items()], None, to_train)
                dataset = make_dataset(outline, Path(base.folder), base.tokenizer, tokens, split, objectives)
            except CorpusError as error:
                return self._blocked(stale, versions, [Refusal(_ALL_REPORTS, str(error))], TOKENIZED_DATASET)
            if dataset.about["known"] >= BLOCKING_SHARE:
                refused = [Refusal(_ALL_REPORTS, how_known(dataset.about["known"]))]
                return self._blocked(stale, versions, refused, TOKENIZED_DATASET)
        except (CorpusError, RecipeError, LedgerError, OSError, ValueError):
            return None
        adapter = self._adapter(dataset, base)
        versions[TOKENIZED_DATASET] = dataset.about["version"]
        if adapter is not None:
            versions[LORA_ADAPTER] = adapter.files[WEIGHTS]
        for stage in STAGES:
            known_adapter = stage == LORA_ADAPTER and adapter is not None
            self._add(stage, stale.get(stage), versions.get(stage), known_adapter)
        return _Outcome(self.stages, dataset, to_train)

    def _blocked(
        self,
        stale: Mapping[Stage, Reason],
        versions: Mapping[Stage, str],
        refused: list[Refusal],
        last: Stage = SECTIONS,
    ) -> "_Outcome":
        for stage in _LIGHT[: _LIGHT.index(last) + 1]:
            self._add(stage, stale.get(stage), versions.get(stage), False)
        return _Outcome(_blocked(self.stages), refused=refused)

    def _add(self, stage: Stage, reason: Reason | None, version: str | None, reused: bool) -> None:
        due = reason is not None and reason.kind != "upstream"
        above = [parent.to_user_string() for parent in stage.parents if parent in self.changes]
        if not due and not above:
            return
        if reason is None or not due:
            reason = Reason("content", f"{above[0]} will have new content")
        same = version is not None and version == version_of(self.made.get(stage.key))
        if not same:
            self.changes.add(stage.key)
        outcome = "unchanged" if same else "reused" if reused else "runs"
        self.stages.append(StagePlan(stage.name, reason.kind, reason.text, outcome))

    def _adapter(self, dataset: Artifact, base: PreparedBase) -> Artifact | None:
        identity = base.identity
        if not base.weights:  # too large to hash for a plan; the last adapter's manifest has it if the base is the same
            last = self.made.get(LORA_ADAPTER.key)
            adapter = last_artifact(self.made, self.workspace.store, LORA_ADAPTER)
            if last is None or adapter is None or input_version(last, BASE_MODEL) != self.now[BASE_MODEL]:
                return None
            identity = adapter.read_json(MANIFEST)["base"]
        return made_before(self.workspace.store, dataset, identity, self.recipe)


def _blocked(stages: list[StagePlan]) -> list[StagePlan]:
    """Return the light stages of a run that a blocking check stops: the last of them is blocked."""
    last = stages[-1] if stages else StagePlan(SECTIONS.name, BLOCKED.kind, BLOCKED.text, "")
    return [*stages[:-1], replace(last, outcome="blocked")]


def _to_train(sections: Artifact, split: Split) -> _ToTrain:
    sizes: Counter[str] = Counter()
    held_out = 0
    for chapter in all_chapters(sections):
        for section in chapter.sections:
            if split.holds_out(chapter.name, section.title):
                held_out += section.used_bytes
            else:
                sizes[chapter.name] += section.used_bytes
    sizes = +sizes  # chapters without usable text are not trained on
    names = tuple(sorted(split.held_out, key=natural_key))
    return _ToTrain(len(sizes), sizes.total(), names, held_out)


def _count(
    plan: Plan,
    made: Materializations,
    workspace: Workspace,
    recipe: Recipe,
    tried: _Outcome | None,
    scan: Scan,
    cost: bool,
) -> None:
    """Fill in whether training is due, and how large it is."""
    outcomes = {stage.stage: stage.outcome for stage in plan.stages}
    plan.trains = outcomes.get(LORA_ADAPTER.name) in ("runs", "if needed")
    if tried and tried.to_train:
        plan.train_chapters, plan.held_out = tried.to_train.chapters, list(tried.to_train.held_out)
        used = tried.to_train.size + tried.to_train.held_out_size
        plan.held_out_share = tried.to_train.held_out_size / max(1, used)
    if tried and tried.dataset:
        rows, plan.train_tokens = (tried.dataset.about["splits"]["train"][name] for name in ("rows", "tokens"))
    elif tried and tried.to_train:
        plan.train_tokens = round(tried.to_train.size / bytes_per_token(workspace.settings, recipe, scan))
        rows = math.ceil(plan.train_tokens / recipe.tokens.block_length)
    else:
        dataset = last_artifact(made, workspace.store, TOKENIZED_DATASET)
        plan.train_tokens = _guess_tokens(dataset, workspace.settings, recipe, scan)
        rows = math.ceil(plan.train_tokens / recipe.tokens.block_length)
    plan.steps = optimizer_steps(rows, recipe) if plan.trains else 0
    if plan.trains:
        plan.advice = few_steps_advice(rows, recipe)
        continues = recipe.training.start == "last" and workspace.releases.current() is not None
        plan.at_most = continues or recipe.training.patience is not None
    if plan.trains and cost:
        plan.training = training_cost(workspace.settings, recipe, plan.train_tokens * recipe.training.epochs)
    due = outcomes.get(RELEASED_ADAPTER.name) in ("runs", "if needed")
    if recipe.release.refit and due and cost:
        learned = 1 - (plan.held_out_share if plan.held_out_share is not None else recipe.tokens.held_out)
        tokens = round(plan.train_tokens / learned)
        plan.refit = training_cost(workspace.settings, recipe, tokens * recipe.training.epochs)
    seconds = plan.training.seconds if plan.training else 0.0
    evaluation = last_artifact(made, workspace.store, ADAPTER_EVALUATION)
    if seconds is not None and evaluation is not None:
        measuring = outcomes.get(ADAPTER_EVALUATION.name) in ("runs", "if needed")
        plan.seconds = seconds + (evaluation.about["seconds"] if measuring else 0.0)


def _guess_tokens(dataset: Artifact | None, settings: Settings, recipe: Recipe, scan: Scan) -> int:
    size = sum(file.size for file in scan.files)
    if dataset is None:
        return round(size / bytes_per_token(settings, recipe, scan))
    ledger = dataset.about["ledger"]
    return round(size * dataset.about["splits"]["train"]["tokens"] / max(1, ledger["bytes_in"]))
