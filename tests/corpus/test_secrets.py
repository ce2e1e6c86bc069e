"""Text that looks like a key or personal data is located, and is never repeated."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sections_of import reviewed

from ft_dagster.config.recipe import Corpus
from ft_dagster.corpus import secrets as secrets_room
from ft_dagster.corpus import sections as sections_room
from ft_dagster.corpus.secrets import LEFT_OUT_HEADING, find_secrets
from ft_dagster.corpus.sections import make_sections, secret_findings
from ft_dagster.corpus.snapshot import take_snapshot
from ft_dagster.store.local import Artifact, Store

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

# Assembled here, so that no repository scanner mistakes them for real ones.
SECRETS = {
    "AWS Access Key": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub Token": "ghp_" + "a1B2" * 9,
    "Slack Token": "xoxb-" + "123456789012-" * 2 + "abcDEF",
    "Stripe Access Key": "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0." + "x" * 40,
    "Private Key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "Basic Auth Credentials": "https://ann:" + "hunter22@host.org/path",
    "Password or key in quotes": 'password = "' + 'correct-horse"',
    "E-mail address": "ann.smith@" + "reports.org",
    "Telephone number": "+49 30 " + "901820 11",
    "IBAN": "GB82 WEST 1234 " + "5698 7654 32",
    "Payment card number": "4111-1111-" + "1111-1111",
}
HARMLESS = [
    "The secret of the house: nobody knew. Their password was long, and the key was lost.",
    "See https://doi.org/10.1016/j.cell.2019.03.041 and arXiv:2305.14314, ISBN 978-3-16-148410-0.",
    "Commit 8f14e45fceea167a5a36dedd4bea2543b0c1f1a9 of 2024-05-06T17:46:19Z, md5 d41d8cd98f00b204e9800998ecf8427e.",
    "From 1,234,567,890 to +10.5 and 4111111111111112; 0.4111111111111111; DE88 3704 0044 0532 0130 00.",
    "Write to you@example.com, or use `@decorator` and me@localhost.",
    "Temperatures of +12 to +14 degrees, p < 0.001 (n = 1 234).",
    'Set api_key = "<your key here>" or password: "{{ password }}".',
]


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_of_secret_is_found_anywhere_in_its_line(kind: str) -> None:
    for before in ("", "It is ", "x " * 1000):
        assert (2, kind) in find_secrets(f"First line.\n{before}{SECRETS[kind]} and more.\nLast line.")


@pytest.mark.parametrize("text", HARMLESS)
def test_prose_hashes_and_invalid_numbers_are_not_reported(text: str) -> None:
    assert find_secrets(text) == []


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text(), st.sampled_from(list(SECRETS)))
def test_a_secret_is_found_whatever_text_surrounds_it(before: str, after: str, kind: str) -> None:
    lines = f"{before} \n {SECRETS[kind]} \n {after}".split("\n")
    assert (before.count("\n") + 2, kind) in find_secrets("\n".join(lines))


@pytest.mark.parametrize(
    "unit", ["eyJ", "//", "password password='", "sl key     ", "a@", "a.", "1 ", "+1", "AB12", "://a:", "`", "x"]
)
def test_detectors_get_pieces_of_lines_whose_number_is_linear_in_the_text(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []
    kinds = secrets_room._kinds

    def noted(piece: str) -> Iterator[str]:
        pieces.append(len(piece))
        return kinds(piece)

    monkeypatch.setattr(secrets_room, "_kinds", noted)
    for size in (20_000, 160_000):
        pieces.clear()
        find_secrets(unit * (size // len(unit)))
        assert max(pieces) <= 512  # some need time quadratic in the length of their input
        assert sum(pieces) < 1.5 * size


class Reports:
    """Chapters of a workspace."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def make(self) -> Artifact:
        return make_sections(take_snapshot(self.folder, self.folder / "files.db", self.store), Corpus())


@pytest.fixture
def reports(tmp_path: Path) -> Reports:
    made = Reports(tmp_path)
    made.write("chapter_markdowns/a.md", "## Costs\n\nThey fell.\n")
    return made


def test_findings_name_chapter_file_heading_line_and_kind_and_never_the_text(reports: Reports) -> None:
    mail, key = SECRETS["E-mail address"], SECRETS["AWS Access Key"]
    reports.write("chapter_markdowns/b.md", f"# By {mail}\n\nOne.\n\n## Two\n\nFine.\n{key} {mail}\n<!-- {key} -->\n")
    reports.write("outputs/consolidated/c.json", json.dumps(reviewed(3, "Old", "Better.", original=f"\n{mail} wrote.")))
    made = reports.make()
    assert [tuple(finding) for finding in secret_findings(made)] == [
        ("b", "chapter_markdowns/b.md", LEFT_OUT_HEADING, 0, "E-mail address"),
        ("b", "chapter_markdowns/b.md", "Two", 2, "AWS Access Key"),
        ("b", "chapter_markdowns/b.md", "Two", 2, "E-mail address"),
        ("chapter_3", "outputs/consolidated/c.json", "Old (what it was rewritten from)", 3, "E-mail address"),
    ]
    said = b"".join(path.read_bytes() for path in made.path.rglob("*") if path.is_file()).decode()
    assert mail not in said and key not in said


def test_only_a_chapter_that_changed_is_searched(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    reports.write("chapter_markdowns/b.md", SECRETS["IBAN"])
    first = reports.make()
    searched = []
    real = secrets_room.chapter_findings
    monkeypatch.setattr(sections_room, "chapter_findings", lambda c: searched.append(c.name) or real(c))
    reports.write("chapter_markdowns/a.md", SECRETS["IBAN"] + " again")
    second = reports.make()
    assert searched == ["a"]
    assert [finding.chapter for finding in secret_findings(first)] == ["b"]
    assert [finding.chapter for finding in secret_findings(second)] == ["a", "b"]
    reports.write("chapter_markdowns/b.md", "Gone.")
    reports.write("chapter_markdowns/a.md", "Gone, too.")
    assert secret_findings(reports.make()) == []


def test_changing_whether_the_check_blocks_does_not_remake_the_sections(reports: Reports) -> None:
    snapshot = take_snapshot(reports.folder, reports.folder / "files.db", reports.store)
    keys = [make_sections(snapshot, Corpus(secrets=mode)).key for mode in ("warn", "block")]
    assert all(one == other for one, other in pairwise(keys))
