"""Drafts of very many bitmaps: found by name at once, and still in the order of the directory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qcow2bm.bitmap.draft import Draft, Drafts
from qcow2bm.format.bitmap_directory import BitmapFlag

NAMES = st.sampled_from([b"a", b"b", b"c", b"d"])
ACTIONS = st.one_of(
    st.tuples(st.just("append"), NAMES),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("replace"), NAMES),
    st.tuples(st.just("rename"), st.tuples(NAMES, NAMES)),
)


def draft(name: bytes) -> Draft:
    return Draft(name, 16, BitmapFlag(0))


def first(listed: list[Draft], name: bytes) -> int | None:
    return next((place for place, one in enumerate(listed) if one.name == name), None)


@given(names=st.lists(NAMES, max_size=6), actions=st.lists(ACTIONS, max_size=20))
def test_they_are_what_a_list_would_be(names: list[bytes], actions: list[tuple[str, object]]) -> None:
    listed = [draft(name) for name in names]
    drafts = Drafts(listed)
    for action, given_name in actions:
        name = given_name[0] if isinstance(given_name, tuple) else given_name
        assert isinstance(name, bytes)
        place = first(listed, name)
        if action == "append":
            listed.append(draft(name))
            drafts.append(listed[-1])
        elif place is None:
            assert drafts.find(name) is None
        elif action == "remove":
            last = len(listed) - 1 - [one.name for one in reversed(listed)].index(name)
            assert drafts.find(name, last=True) is listed.pop(last)
            drafts.remove_last(name)
        elif action == "replace":
            listed[place] = draft(name)
            drafts.replace_first(listed[place])
        elif isinstance(given_name, tuple):
            drafts.rename_first(name, given_name[1])
        assert [id(one) for one in drafts] == [id(one) for one in listed]
        assert len(drafts) == len(listed)
        for wanted in (b"a", b"b", b"c", b"d"):
            place = first(listed, wanted)
            assert drafts.find(wanted) is (None if place is None else listed[place])
