"""Pages of results with one section for each kind of machine."""


def with_section(title: str, text: str, machine: str, section: str) -> str:
    """Return a page with one section replaced or added. The sections of other machines are kept.

    Args:
        title: the first line of the page, a heading.
        text: the current page; empty for a new one.
        machine: the heading of the section.
        section: the Markdown of the section.
    """
    _, *found = text.strip().split("\n\n## ")
    sections = {name: body for name, _, body in (part.partition("\n\n") for part in found)} | {machine: section}
    return "\n\n".join([title, *(f"## {name}\n\n{body}" for name, body in sections.items())]) + "\n"
