"""What looks like a key or like personal data in text: of what kind, and in which line. Never what it says.

Keys are known by the detectors of detect-secrets that know an issuer's form; those that go by randomness or by a
word alone are left out, because hashes and prose about security would be reported. No detector asks an issuer
whether a key is valid: nothing leaves the machine.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from ft_dagster.corpus.chapter import Chapter

LEFT_OUT_HEADING = "(left out: the finding is in the heading)"
_NOISY = frozenset(
    {
        "ArtifactoryDetector",  # any long word in capitals that begins with AP
        "Base64HighEntropyString",
        "HexHighEntropyString",
        "IPPublicDetector",
        "KeywordDetector",  # `_ASSIGNMENT` does this with quotes required, and in linear time
    }
)
_PIECE, _OVERLAP = 512, 128
"""Characters looked at in one go, and shared with the next: some detectors take time with the square of a line.
No form that is known here needs more than the overlap to be recognized."""
_MAYBE_KEY = re.compile(r"[\w+/=.:@-]{18}|PRIVATE KEY|PuTTY-User|://|(?i:softlayer|cloudant|mailchimp|authtoken)")
"""What every key has: a long run without blanks, or a word that says so. Prose mostly has none."""
_ASSIGNMENT = re.compile(
    r"(?i)(?:password|passwd|passphrase|secret|api[_-]?key|auth[_-]?token|access[_-]?token|client[_-]?secret)"
    r"[\"']?[ \t]{0,4}(?::=|=>|[:=])[ \t]{0,4}([\"'`])[^\s\"'`<>{}$]{8,200}\1"
)
_MAIL = re.compile(r"(?<![\w.+@-])[\w.+-]{1,64}@((?:[a-zA-Z0-9-]{1,63}\.){1,8}[a-zA-Z]{2,24})(?![\w-])")
_NOBODY = re.compile(r"(?i)(?:^|\.)(?:example(?:\.(?:com|org|net))?|test|invalid|localhost)$")
"""Domains that belong to nobody (RFC 2606)."""
_PHONE = re.compile(
    r"(?<![\w+./=-])(?:\+[1-9](?:[ .\-/]{0,2}\(?[0-9]\)?){7,14}|\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ][0-9]{4})(?![\w-])"
)
"""Numbers with a country code (E.164: at most 15 digits) and North American ones with an area code in brackets."""
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_CARD = re.compile(
    r"(?<![\w.,/+-])(?:(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|6(?:011|5[0-9]{2})|35[0-9]{2})(?:[ -]?[0-9]{4}){3}"
    r"|3[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5})(?![\w-]|[.,][0-9])"
)
"""Of the large issuers, in the groups that are printed on cards or in one run."""


class Finding(NamedTuple):
    """Text that looks like a key or like personal data. It does not hold that text."""

    chapter: str
    source: str
    """The file, relative to the workspace."""
    heading: str
    """The section's title, or a placeholder if the title itself holds the secret."""
    line: int
    """Of the cleaned section, from 1; 0 is the heading, and the headings above it."""
    kind: str
    """`E-mail address`, `AWS Access Key`."""


def chapter_findings(chapter: Chapter) -> list[Finding]:
    """What is found in a chapter's sections and in what they were rewritten from, each kind once in each line."""
    found: list[Finding] = []
    for section in chapter.sections:
        heading = "\n".join([*section.lead, section.title])
        found += _in_part(chapter.name, section.source, section.title, [heading.replace("\n", " "), section.text])
    for pair in chapter.pairs:
        title = f"{pair.title} (what it was rewritten from)"
        found += _in_part(chapter.name, pair.source, title, [pair.title, "\n".join([pair.original, *pair.brief])])
    return found


def _in_part(chapter: str, source: str, heading: str, texts: Sequence[str]) -> Iterator[Finding]:
    title, body = texts
    in_title = dict.fromkeys(kind for _, kind in find_secrets(title))
    shown = LEFT_OUT_HEADING if in_title else heading
    yield from (Finding(chapter, source, shown, 0, kind) for kind in in_title)
    yield from (Finding(chapter, source, shown, line, kind) for line, kind in find_secrets(body))


def find_secrets(text: str) -> list[tuple[int, str]]:
    """(line from 1, kind) of what looks like a key or like personal data; time grows with the text's length only.

    >>> find_secrets("Write to\\nann@reports.org.")
    [(2, 'E-mail address')]
    """
    found: dict[tuple[int, str], None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        for start in range(0, max(1, len(line) - _OVERLAP), _PIECE - _OVERLAP):
            piece = line[start : start + _PIECE]
            found.update(dict.fromkeys((number, kind) for kind in _kinds(piece)))
    return list(found)


def _kinds(line: str) -> Iterator[str]:
    if _MAYBE_KEY.search(line):
        for kind, search in _detectors():
            if any(search(line)):
                yield kind
    if _ASSIGNMENT.search(line):
        yield "Password or key in quotes"
    if "@" in line and any(not _NOBODY.search(match[1]) for match in _MAIL.finditer(line)):
        yield "E-mail address"
    if ("+" in line or "(" in line) and _PHONE.search(line):
        yield "Telephone number"
    if any(is_iban(match[0]) for match in _IBAN.finditer(line)):
        yield "IBAN"
    if any(is_card_number(match[0]) for match in _CARD.finditer(line)):
        yield "Payment card number"


@cache
def _detectors() -> list[tuple[str, Callable[[str], Iterator[Any]]]]:
    """(kind, what yields the matches of a line) of each of detect-secrets' detectors in use."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    classes = get_mapping_from_secret_type_to_class()
    return [(kind, made().analyze_string) for kind, made in sorted(classes.items()) if made.__name__ not in _NOISY]


def is_iban(text: str) -> bool:
    """Whether the check digits of an IBAN fit (ISO 13616: the number, its first four at the end, is 1 modulo 97).

    >>> is_iban("DE89 3704 0044 0532 0130 00"), is_iban("DE88 3704 0044 0532 0130 00")
    (True, False)
    """
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def is_card_number(text: str) -> bool:
    """Whether the check digit of a card's number fits (Luhn, ISO/IEC 7812-1).

    >>> is_card_number("4111 1111 1111 1111"), is_card_number("4111 1111 1111 1112")
    (True, False)
    """
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    return sum(digits[0::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 == 0
