"""Pages of results that keep one section for each kind of machine."""


def with_section(title: str, text: str, machine: str, section: str) -> str:
    """A page with one section replaced or added; those of other machines stay.

    Args:
        title: first line of the page, a heading.
        text: the page as it is; empty for a new one.
        machine: heading of the section.
        section: its Markdown.
    """
    _, *found = text.strip().split("\n\n## ")
    sections = {name: body for name, _, body in (part.partition("\n\n") for part in found)} | {machine: section}
    return "\n\n".join([title, *(f"## {name}\n\n{body}" for name, body in sections.items())]) + "\n"
