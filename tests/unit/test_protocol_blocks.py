# SPDX-License-Identifier: Apache-2.0
"""Block keys: what they depend on, what they don't, and how well they are mixed."""

import numpy as np
import pytest

from tandem_protocol.blocks import extend, extra_key, hash_blocks, root_of, salt_of
from tandem_protocol.errors import RequestError

STABLE = [13355946944392371665, 6003849491770835997]
TOKENS = np.random.default_rng(7).integers(0, 150_000, 640).astype(np.int32)


def test_one_key_per_full_block() -> None:
    """The rest that fills no block has no key."""
    assert hash_blocks(TOKENS[:47], 16).shape == (2,)
    assert hash_blocks(TOKENS[:15], 16).shape == (0,)


@pytest.mark.parametrize("size", [1, 3, 8, 16, 32, 33])
def test_keys_chain(size: int) -> None:
    """Extending a prefix by the rest gives the keys of the whole, at every cut."""
    whole = hash_blocks(TOKENS, size, salt=5)
    for cut in (1, 2, len(whole) - 1):
        head = hash_blocks(TOKENS[: cut * size], size, salt=5)
        assert np.array_equal(np.concatenate([head, extend(int(head[-1]), TOKENS[cut * size :], size)]), whole)


def test_a_root_extends_to_the_first_block() -> None:
    """`root_of` is the parent of a sequence's first block."""
    assert np.array_equal(extend(root_of(9), TOKENS, 16), hash_blocks(TOKENS, 16, salt=9))


def test_the_container_of_tokens_does_not_matter() -> None:
    """Lists, tuples, int32, int64, uint32, strided and read-only arrays give equal keys."""
    expected = hash_blocks(TOKENS, 16)
    strided, frozen = np.repeat(TOKENS, 2)[::2], TOKENS.copy()
    frozen.flags.writeable = False
    for form in (TOKENS.tolist(), tuple(TOKENS.tolist()), TOKENS.astype(np.int64), TOKENS.astype(np.uint32), strided, frozen):
        assert np.array_equal(hash_blocks(form, 16), expected)
    assert TOKENS.flags.writeable


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_token_ids_beyond_32_bits_are_no_tokens(token: int) -> None:
    """A list of them is an error rather than the key of another prompt."""
    with pytest.raises(OverflowError):
        hash_blocks([token] * 16, 16)


def test_keys_depend_on_every_token_before() -> None:
    """One changed token changes its block's key and all later ones, no earlier one."""
    changed = TOKENS.copy()
    changed[16 * 7 + 5] ^= 1
    same = hash_blocks(changed, 16) == hash_blocks(TOKENS, 16)
    assert same.tolist() == [True] * 7 + [False] * 33


def test_keys_are_stable() -> None:
    """Routers of one fleet share keys and snapshots, so the hash may not drift."""
    assert hash_blocks(range(32), 16).tolist() == STABLE


def test_adapters_have_keys_of_their_own() -> None:
    """The base model and each adapter differ on equal tokens; the base model's salt is 0."""
    assert salt_of("") == 0
    assert len({int(hash_blocks(TOKENS, 16, salt_of(name))[0]) for name in ("", "a", "b")}) == 3


def test_extra_keys_change_their_block_and_those_after() -> None:
    """Equal placeholder tokens with another image are another block."""
    extra = np.zeros(40, np.uint64)
    plain = hash_blocks(TOKENS, 16)
    assert np.array_equal(hash_blocks(TOKENS, 16, extra=extra), plain)
    extra[3] = extra_key([("image-hash", 0)])
    assert (hash_blocks(TOKENS, 16, extra=extra) == plain).tolist() == [True] * 3 + [False] * 37


def test_the_adapters_name_is_not_counted_twice() -> None:
    """vLLM puts it first into every block's extra keys; only what is beside it counts."""
    assert extra_key(["lora"], "lora") == 0
    assert extra_key(("lora", ("image", 3)), "lora") == extra_key([["image", 3]]) != 0
    assert extra_key(["lora"]) != 0
    assert extra_key(None) == extra_key([]) == 0


def test_keys_are_well_mixed() -> None:
    """Flipping any one bit of a token flips each of the 64 bits of the key in about half of the cases."""
    base = np.random.default_rng(1).integers(0, 2**18, (400, 16)).astype(np.uint32)
    for bit in range(0, 16 * 18, 23):
        flipped = base.copy()
        flipped[:, bit // 18] ^= np.uint32(1 << bit % 18)
        changed = np.array([hash_blocks(one, 16) ^ hash_blocks(two, 16) for one, two in zip(base, flipped, strict=True)])
        share = np.unpackbits(changed.view(np.uint8)).reshape(400, 64).mean(axis=0)
        assert 0.35 < share.min() < share.max() < 0.65


def test_no_collisions_and_no_zero_in_a_million_blocks() -> None:
    """Neighbouring token ids, the worst case of a weak hash."""
    keys = np.concatenate([hash_blocks(np.arange(start, start + 100_000), 1) for start in range(0, 1_000_000, 100_000)])
    assert len(np.unique(keys)) == len(keys)
    assert keys.all()


def test_wrong_sizes_are_refused() -> None:
    """A block size below 1, or extra keys that don't fit the blocks."""
    with pytest.raises(RequestError, match="at least 1"):
        hash_blocks(TOKENS, 0)
    with pytest.raises(RequestError, match="2 extra keys for 40 full blocks"):
        hash_blocks(TOKENS, 16, extra=np.zeros(2, np.uint64))
    with pytest.raises(RequestError, match="can't be encoded"):
        extra_key([object()])
