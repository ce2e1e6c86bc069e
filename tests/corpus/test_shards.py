"""Groups of chapters: the same names give the same groups, and adding or removing one name changes few of them."""

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dagster.corpus.shards import LIMIT, group_names, overlap

NAMES = st.sets(st.text("abcdé/ 0123456789", min_size=1, max_size=4), max_size=40)
LIMITS = st.integers(1, 6)


def members(names: set[str], limit: int) -> set[tuple[str, ...]]:
    return {tuple(group) for group in group_names(names, limit).values()}


@settings(max_examples=200, deadline=None)
@given(NAMES, LIMITS)
def test_every_name_is_in_one_group_and_no_group_is_above_the_limit_or_empty(names: set[str], limit: int) -> None:
    groups = group_names(names, limit)
    assert Counter(name for group in groups.values() for name in group) == dict.fromkeys(names, 1)
    assert all(0 < len(group) <= limit for group in groups.values())


@settings(max_examples=100, deadline=None)
@given(NAMES, LIMITS, st.randoms(use_true_random=False))
def test_groups_depend_on_the_set_of_names_only(names: set[str], limit: int, random: Random) -> None:
    shuffled = sorted(names) * 2
    random.shuffle(shuffled)
    assert list(group_names(shuffled, limit).items()) == list(group_names(names, limit).items())


@settings(max_examples=300, deadline=None)
@given(NAMES, st.text("xyz", min_size=1, max_size=4), LIMITS)
def test_adding_or_removing_a_name_changes_splits_or_joins_one_group(names: set[str], name: str, limit: int) -> None:
    without, with_it = members(names, limit), members(names | {name}, limit)
    assert len(without - with_it) <= 1
    assert len(with_it - without) <= 2
    assert any(name in group for group in with_it - without)


@settings(max_examples=100, deadline=None)
@given(NAMES, NAMES, LIMITS)
def test_groups_of_different_times_that_have_a_member_in_common_overlap(
    before: set[str], after: set[str], limit: int
) -> None:
    for old, old_members in group_names(before, limit).items():
        for new, new_members in group_names(after, limit).items():
            assert overlap(old, new) or set(old_members).isdisjoint(new_members)


def test_groups_of_one_time_do_not_overlap() -> None:
    groups = list(group_names(map(str, range(100)), limit=5))
    assert not any(overlap(one, other) for one in groups for other in groups if one != other)


def test_chapters_up_to_the_limit_are_one_group() -> None:
    names = [f"chapter_{number}" for number in range(LIMIT)]
    assert group_names(names) == {"": sorted(names)}
    assert len(group_names([*names, "one more"])) == 2


def test_no_names_give_no_groups() -> None:
    assert group_names([]) == {}
