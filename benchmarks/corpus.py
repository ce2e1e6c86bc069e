"""Generate reports of any size for benchmarks by recombining real sections.

A generated chapter has three sections. Each takes its title and paragraphs from one section of the given reports, with
one paragraph replaced by one of another section, and ends with a sentence that no other chapter contains, so that
deduplication keeps it.
"""

import random
from pathlib import Path

from ft_dagster.corpus.files import decode
from ft_dagster.corpus.markdown import parse_markdown

SECTIONS = 3
_IN_FOLDER = 1000


def write_chapters(reports: Path, workspace: Path, count: int, seed: int = 7) -> int:
    """Write `count` chapters, recombined from `reports`, to `workspace/chapter_markdowns`. Return their total bytes."""
    sections = [
        (section.title or "Text", section.text.split("\n\n"))
        for path in sorted(reports.rglob("*.md"))
        for section in parse_markdown(decode(path.read_bytes())).sections
    ]
    if not sections:
        raise SystemExit(f"{reports} contains no Markdown to recombine.")
    folder = workspace / "chapter_markdowns"
    size = 0
    for number in range(count):
        path = folder / f"part_{number // _IN_FOLDER}" / f"chapter_{number}.md"
        if number % _IN_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        data = _chapter(random.Random(f"{seed}:{number}"), sections, number).encode()  # noqa: S311 - no secret
        path.write_bytes(data)
        size += len(data)
    return size


def _chapter(chance: random.Random, sections: list[tuple[str, list[str]]], number: int) -> str:
    blocks = [f"# Part {number // _IN_FOLDER}, report {number}"]
    for place in range(SECTIONS):
        title, paragraphs = chance.choice(sections)
        _, others = chance.choice(sections)
        mixed = list(paragraphs)
        mixed[chance.randrange(len(mixed))] = chance.choice(others)
        blocks += [f"## {title}", *mixed, f"This is entry {number}.{place} of the register."]
    return "\n\n".join(blocks) + "\n"
