"""Sizes, ranges and shares, as users write and read them."""

from __future__ import annotations

import pytest

from qcow2bm.cli.sizes import human_size, parse_range, parse_size, percent
from qcow2bm.errors import UsageError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("64k", 64 << 10),
        ("64K", 64 << 10),
        ("64KiB", 64 << 10),
        ("1M", 1 << 20),
        ("10G", 10 << 30),
        ("2T", 2 << 40),
        ("8E", 8 << 60),
        ("0x10000", 65536),
        ("0XffFF", 65535),
    ],
)
def test_sizes(text: str, number: int) -> None:
    assert parse_size(text) == number


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "1.5G", "64kb", "64 k", "1MM", "0x", "0xg", "٣", "1" * 21, " 1", "1\n", "+1"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_a_range_has_an_offset_and_a_length() -> None:
    assert parse_range("1G+64k") == (1 << 30, 64 << 10)
    assert parse_range("0+0x200") == (0, 512)


@pytest.mark.parametrize("text", ["", "5", "+", "1+", "+1", "1-2", "1+2+3"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError):
        parse_range(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1 MiB"),
        ((1 << 20) - 1, "1 MiB"),  # and not 1024.0 KiB
        (3 << 39, "1.5 TiB"),
        (1 << 80, "1048576 EiB"),
    ],
)
def test_sizes_for_humans(number: int, text: str) -> None:
    assert human_size(number) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 100, "0 %"),
        (0, 0, "0 %"),
        (1, 10**9, "<0.1 %"),
        (1, 8, "12.5 %"),
        (10**9 - 1, 10**9, ">99.9 %"),
        (5, 5, "100 %"),
    ],
)
def test_only_nothing_is_0_percent_and_only_everything_100(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text
