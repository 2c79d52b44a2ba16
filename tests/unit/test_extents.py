"""Each way in which a list of extents can be wrong has words that name the row."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from qcow2bm.bitmap import extents
from qcow2bm.bitmap.algebra import Ranges
from qcow2bm.bitmap.extents import Where, decoded, parse_extents, read_extents
from qcow2bm.errors import UsageError

MAP = '{"start": %s, "length": %s, "depth": 0, "present": true, "zero": false, "data": true, "offset": 0}'
NBD = '{"offset": %d, "length": 1, "type": %s, "description": "%s"}'


def listed(*rows: str) -> str:
    return f"[{','.join(rows)}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("0,1", "may be cut short"),
        ("0,1\n1\n", "line 2 has 1 fields"),
        ("0,1\n\n", "line 2 has 1 fields"),
        ("offset,length\n0,1,true\n", "line 2 has 3 fields"),
        ("offset,length,dirty\n0,1,yes\n", "line 2 is no extent that is known"),
        ("start,length\n0,1\n", "'offset' of line 1 is no number of bytes"),
        ("0,1e3\n", "'length' of line 1 is no number of bytes"),
        ("-1,1\n", "'offset' of line 1 is no number of bytes"),
        ("0x10,1\n", "'offset' of line 1 is no number of bytes"),
        ("0,1\n1,1\n1,1\n", "line 3 begins at 1, before the end 2 of the row before it"),
        ("4,1\n0,1\n", "line 2 begins at 0, before the end 5"),
        ("0,0\n", "line 1 has length 0"),
        ("0,1\n99,2\n", "line 2 ends at 101, past the end of the disk, which is 100"),
        (f"0,{1 << 66}\n", "line 1 ends at"),
        (f"0,{'9' * 5000}\n", "'length' of line 1 is no number of bytes"),
        ("[", "no JSON at row 1"),
        ("[1]", "row 1 is no object"),
        ("[{}]", "row 1 is no extent that is known"),
        ('[{"offset": 0, "length": 1, "kind": 1}]', "row 1 is no extent that is known"),
        (listed(MAP % (0, 1), MAP % (1, "1.5")), "no JSON at row 2: 1.5 is no number of bytes"),
        (listed(MAP % (0, "NaN")), "no JSON at row 1: NaN is no number of bytes"),
        (listed(MAP % (0, "1e3")), "no JSON at row 1: 1e3 is no number of bytes"),
        (listed(MAP % (0, "9" * 5000)), "no JSON at row 1: 9999"),
        (listed(MAP % (0, "true")), "'length' of row 1 is no number of bytes: True"),
        (listed(MAP % (0, '"1"')), "'length' of row 1 is no number of bytes: '1'"),
        (listed(MAP % (0, "-1")), "'length' of row 1 is no number of bytes: -1"),
        (listed(MAP % (0, 1)) + "x", "there is more behind"),
        (listed(MAP % (0, 1))[:-1], "no JSON at the end of row 1"),
        (listed(MAP % (0, 1)).replace('"present": true, ', ""), "row 1 has no 'present'"),
        (listed(MAP % (0, 1)).replace('"zero": false', '"zero": 0'), "row 1 is no extent that is known"),
        (listed(MAP % (0, 1)).replace('"depth": 0', '"start": 9'), "a key is there twice"),
        (listed(NBD % (0, 1, "dirty"), NBD % (1, 1, "hole")), "row 2 is of another kind (a list of base:allocation)"),
        (listed(NBD % (0, 1, "clean")), "row 1 is of no metadata context that is known"),
        (listed(NBD % (0, 1, "dusty")), "type 1, 'dusty'"),
        (listed(NBD % (0, "true", "dirty")), "type True"),
        (listed('{"offset": 0, "length": 1, "type": 1}'), "type 1, None"),
        (listed(NBD % (0, 2, "backing depth 3")), "row 1 is of no metadata context"),
        ('{"virtual-size": 99, "extents": []}', "about a disk of 99 bytes, this one has 100"),
        ('{"a": 1}', "holds no list of extents"),
        ('{"extents": [], "extents": []}', "is there twice"),
        ('{"extents": 1}', "'[' is missing"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_extents(text.encode(), size=100)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_is_no_text_is_refused() -> None:
    for data in (b"\xff\xfe0\0", b"QFI\xfb" + bytes(100)):
        with pytest.raises(UsageError, match="no text in UTF-8"):
            read_extents(data)


def test_a_list_that_is_too_large_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extents, "MAX_LIST_BYTES", 10)
    with pytest.raises(UsageError, match="above 10 bytes"):
        read_extents(b"0,1\n" * 3)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("0,1\n", Where.DATA),
        ("offset,length,dirty\n0,1,true\n", Where.ALLOCATED),
        (listed(MAP % (0, 1)), Where.DIRTY),
        (listed(NBD % (0, 1, "dirty")), Where.DATA),
        (listed(NBD % (0, 1, "hole")), Where.ALLOCATED),
        (listed(NBD % (0, 1, "local")), Where.DATA),
    ],
)
def test_a_list_is_not_asked_what_it_cannot_tell(text: str, where: Where) -> None:
    with pytest.raises(UsageError, match=f"cannot tell '{where}'") as caught:
        read_extents(text.encode(), where=where)
    assert "it can tell" in str(caught.value.hint)


def test_byte_order_mark_line_ends_and_spaces_are_no_matter() -> None:
    assert read_extents(b"\xef\xbb\xbfoffset, length\r\n0, 5\r\n9, 1\r\n") == [(0, 5), (9, 1)]
    assert read_extents(b"[]") == []
    assert read_extents(b"offset,length\n") == []


def test_hundreds_of_thousands_of_rows_are_quick() -> None:
    data = ("[" + ",\n".join(MAP % (place << 17, 65536) for place in range(200_000)) + "]").encode()
    started = time.process_time()
    assert len(read_extents(data)) == 200_000
    assert time.process_time() - started < 20  # about 1 s; the square of the rows would be hours


def test_many_rows_become_ranges_of_sixteen_bytes_each() -> None:
    """A row lives only until the next one: 64 bytes more or less for each would be gigabytes for the largest list."""
    count = 50_000
    text = decoded(b"offset,length\n" + b"".join(b"%d,512\n" % (place << 17) for place in range(count)))
    tracemalloc.start()
    found = Ranges.of((offset, offset + length) for offset, length in parse_extents(text))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(found), found.total) == (count, count * 512)
    assert peak < 20 * count + (64 << 10)  # an array grows ahead of what is in it
