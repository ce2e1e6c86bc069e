"""After kills at any moment and restarts, the result is that of an undisturbed run."""

import shutil
from pathlib import Path

from dagster_dev import WRITING, DagsterDev
from lineage import trained_on
from reports import prose_of


def test_an_edit_survives_sigkill_of_everything_at_any_moment_and_makes_one_adapter(
    finished: Path, tmp_path: Path
) -> None:
    for part in ("workspace", "home"):
        shutil.copytree(finished / part, tmp_path / part, symlinks=True)
    workspace = tmp_path / "workspace"
    with (workspace / "chapter_markdowns" / "chapter_1.md").open("a") as chapter:  # while no sensor runs
        chapter.write("\nThe ferry went only once.\n")
        chapter.writelines(prose_of(number) for number in range(20, 26))  # takes some seconds to train on
    with DagsterDev(tmp_path, FT_SETTLE_SECONDS="600") as dev:
        made, before = dev.made(), dev.runs()
        dev.until_skipped(WRITING)
        (itself,) = dev.kinds()["dagster dev"]
        itself.kill()  # while the reports are given time to settle; the servers that it started survive
        dev.until_ended()
        dev.environment["FT_SETTLE_SECONDS"] = "1"
        dev.start()
        kinds = dev.kinds()
        assert (len(kinds["web server"]), len(kinds["daemon"])) == (1, 1), "the earlier servers have been stopped"
        dev.until_training()
        dev.kill(spare="ft_dagster.training")  # which exits with the run that started it
        dev.until_gone()
        assert not list((workspace / ".ft" / "attempts").glob("*/*/result.json")), "it did not go on by itself"
        dev.start()
        dev.until_evaluating()
        dev.kill()
        dev.until_gone()
        dev.start()
        dev.until_up_to_date()

        runs = dev.runs()[len(before) :]
        assert [run.status for run in runs] == ["FAILURE", "FAILURE", "SUCCESS"]
        assert len({run.tags["ft_dagster/cause"] for run in runs}) == 1
        (new,) = dev.made().adapters - made.adapters
        assert (workspace / "fine_tuned_model").resolve().name == new
        assert "The ferry went only once." in trained_on(workspace)["chapter_1"]
        assert dev.not_fresh() == set()
        assert not any((workspace / ".ft" / "attempts").iterdir()), "nothing is left half made"
