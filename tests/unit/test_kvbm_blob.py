# SPDX-License-Identifier: Apache-2.0
"""A footer proves its block, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_kvbm.blob import FOOTER_BYTES, CorruptBlockError, check_footer, make_footer

KEY, LAYOUT = b"k" * 36, b"l" * 32
BLOCK = bytes(range(256)) * 8


def test_a_footer_proves_its_own_block() -> None:
    footer = make_footer(KEY, LAYOUT, memoryview(BLOCK))
    assert len(footer) == FOOTER_BYTES
    check_footer(footer, KEY, LAYOUT, memoryview(BLOCK))


@given(st.integers(0, len(BLOCK) * 8 - 1))
def test_any_flipped_bit_of_the_block_is_seen(bit: int) -> None:
    footer = make_footer(KEY, LAYOUT, memoryview(BLOCK))
    torn = bytearray(BLOCK)
    torn[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(CorruptBlockError, match="checksum"):
        check_footer(footer, KEY, LAYOUT, memoryview(torn))


@given(st.integers(0, FOOTER_BYTES * 8 - 1))
def test_any_flipped_bit_of_the_footer_is_seen_or_without_meaning(bit: int) -> None:
    torn = bytearray(make_footer(KEY, LAYOUT, memoryview(BLOCK)))
    torn[bit // 8] ^= 1 << (bit % 8)
    if 6 <= bit // 8 < 8:  # the flags, which no version reads yet
        check_footer(bytes(torn), KEY, LAYOUT, memoryview(BLOCK))
        return
    with pytest.raises(CorruptBlockError):
        check_footer(bytes(torn), KEY, LAYOUT, memoryview(BLOCK))


@pytest.mark.parametrize(("key", "layout"), [(b"x" * 36, LAYOUT), (KEY, b"x" * 32), (KEY + LAYOUT[:1], LAYOUT[1:])])
def test_a_block_of_another_key_or_layout_is_refused(key: bytes, layout: bytes) -> None:
    footer = make_footer(KEY, LAYOUT, memoryview(BLOCK))
    with pytest.raises(CorruptBlockError):
        check_footer(footer, key, layout, memoryview(BLOCK))


def test_a_footer_of_another_length_or_of_zeros_is_refused() -> None:
    footer = make_footer(KEY, LAYOUT, memoryview(BLOCK))
    for wrong in (b"", footer[:-1], footer + b"\0", bytes(FOOTER_BYTES)):
        with pytest.raises(CorruptBlockError):
            check_footer(wrong, KEY, LAYOUT, memoryview(BLOCK))
