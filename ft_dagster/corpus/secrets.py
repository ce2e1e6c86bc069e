"""Finding text that looks like a key or like personal data: its kind and its line, but never the text itself.

Keys are found by those detectors of detect-secrets that know the format of an issuer. Detectors that rely on randomness
or on a single word are excluded, because they would report hashes and prose about security. No detector asks an issuer
whether a key is valid: no data leaves the machine.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from ft_dagster.corpus.chapter import Chapter

LEFT_OUT_HEADING = "(left out: the finding is in the heading)"
_NOISY = frozenset(
    {
        "ArtifactoryDetector",  # matches any long word in capitals that starts with AP
        "Base64HighEntropyString",
        "HexHighEntropyString",
        "IPPublicDetector",
        "KeywordDetector",  # `_ASSIGNMENT` replaces it: it requires quotes and takes linear time
    }
)
_PIECE, _OVERLAP = 512, 128
"""Number of characters that are searched together, and number shared with the next piece: some detectors take time
quadratic in the length of a line. No known format needs more than the overlap to be recognized."""
_MAYBE_KEY = re.compile(r"[\w+/=.:@-]{18}|PRIVATE KEY|PuTTY-User|://|(?i:softlayer|cloudant|mailchimp|authtoken)")
"""Matches what every key contains: a long run without blanks, or a telltale word. Most prose contains neither."""
_ASSIGNMENT = re.compile(
    r"(?i)(?:password|passwd|passphrase|secret|api[_-]?key|auth[_-]?token|access[_-]?token|client[_-]?secret)"
    r"[\"']?[ \t]{0,4}(?::=|=>|[:=])[ \t]{0,4}([\"'`])[^\s\"'`<>{}$]{8,200}\1"
)
_MAIL = re.compile(r"(?<![\w.+@-])[\w.+-]{1,64}@((?:[a-zA-Z0-9-]{1,63}\.){1,8}[a-zA-Z]{2,24})(?![\w-])")
_RESERVED_DOMAIN = re.compile(r"(?i)(?:^|\.)(?:example(?:\.(?:com|org|net))?|test|invalid|localhost)$")
"""Matches domains that belong to nobody (RFC 2606)."""
_PHONE = re.compile(
    r"(?<![\w+./=-])(?:\+[1-9](?:[ .\-/]{0,2}\(?[0-9]\)?){7,14}|\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ][0-9]{4})(?![\w-])"
)
"""Matches telephone numbers with a country code (E.164: at most 15 digits), and North American ones with an area code
in parentheses."""
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_CARD = re.compile(
    r"(?<![\w.,/+-])(?:(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|6(?:011|5[0-9]{2})|35[0-9]{2})(?:[ -]?[0-9]{4}){3}"
    r"|3[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5})(?![\w-]|[.,][0-9])"
)
"""Matches card numbers of the large issuers, in groups as printed on cards or without separators."""


class SecretFinding(NamedTuple):
    """The location and kind of a text that looks like a key or like personal data, without the text itself."""

    chapter: str
    source: str
    """The file, relative to the workspace."""
    heading: str
    """The section's title, or a placeholder if the title itself contains the secret."""
    line: int
    """Line of the cleaned section, from 1; 0 stands for the heading and the headings above it."""
    kind: str
    """The kind of text, such as `E-mail address` or `AWS Access Key`."""


def chapter_findings(chapter: Chapter) -> list[SecretFinding]:
    """Return the findings in a chapter's sections and in the originals of its pairs, each kind once per line."""
    found: list[SecretFinding] = []
    for section in chapter.sections:
        heading = "\n".join([*section.lead, section.title])
        found += _in_part(chapter.name, section.source, section.title, [heading.replace("\n", " "), section.text])
    for pair in chapter.pairs:
        title = f"{pair.title} (what it was rewritten from)"
        found += _in_part(chapter.name, pair.source, title, [pair.title, "\n".join([pair.original, *pair.brief])])
    return found


def _in_part(chapter: str, source: str, heading: str, texts: Sequence[str]) -> Iterator[SecretFinding]:
    title, body = texts
    in_title = dict.fromkeys(kind for _, kind in find_secrets(title))
    shown = LEFT_OUT_HEADING if in_title else heading
    yield from (SecretFinding(chapter, source, shown, 0, kind) for kind in in_title)
    yield from (SecretFinding(chapter, source, shown, line, kind) for line, kind in find_secrets(body))


def find_secrets(text: str) -> list[tuple[int, str]]:
    """Return (line from 1, kind) of each text that looks like a key or like personal data.

    The time it takes is linear in the length of the text.

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
    if "@" in line and any(not _RESERVED_DOMAIN.search(match[1]) for match in _MAIL.finditer(line)):
        yield "E-mail address"
    if ("+" in line or "(" in line) and _PHONE.search(line):
        yield "Telephone number"
    if any(is_iban(match[0]) for match in _IBAN.finditer(line)):
        yield "IBAN"
    if any(is_card_number(match[0]) for match in _CARD.finditer(line)):
        yield "Payment card number"


@cache
def _detectors() -> list[tuple[str, Callable[[str], Iterator[Any]]]]:
    """Return (kind, function that yields the matches in a line) of each detector of detect-secrets that is used."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    classes = get_mapping_from_secret_type_to_class()
    return [(kind, made().analyze_string) for kind, made in sorted(classes.items()) if made.__name__ not in _NOISY]


def is_iban(text: str) -> bool:
    """Whether the check digits of an IBAN are correct.

    ISO 13616: the number, with its first four characters moved to the end, must be 1 modulo 97.

    >>> is_iban("DE89 3704 0044 0532 0130 00"), is_iban("DE88 3704 0044 0532 0130 00")
    (True, False)
    """
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def is_card_number(text: str) -> bool:
    """Whether the check digit of a card number is correct (Luhn, ISO/IEC 7812-1).

    >>> is_card_number("4111 1111 1111 1111"), is_card_number("4111 1111 1111 1112")
    (True, False)
    """
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    return sum(digits[0::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 == 0
