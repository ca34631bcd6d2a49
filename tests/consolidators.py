# SPDX-License-Identifier: Apache-2.0
"""What the consolidator's tests compare with: the rule in plain sets, a strict consumer, and streams that lose, double and swap."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier, decode

BLOCK = 2
"""Tokens per block."""

Key = tuple[Any, ...]
Held = dict[tuple[Tier, int, int], Key]
"""(tier, group, hash) -> what the block and all before it contain."""


def stored(hashes: list[int], parent: int | None = None, medium: str = "GPU", **fields: Any) -> dict[str, Any]:
    """A `BlockStored` as on the wire; a block's tokens follow from its hash."""
    tokens = [token for block in hashes for token in (block, block + 1)]
    return {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens, "block_size": BLOCK,
            "lora_id": None, "lora_name": None, "medium": medium, **fields}


def named(hashes: list[int], medium: str = "CPU", **fields: Any) -> dict[str, Any]:
    """A `BlockStored` that tells nothing but the hashes."""
    return stored(hashes, None, medium, **{"token_ids": [], "block_size": 0, **fields})


def removed(hashes: list[int], medium: str = "GPU", **fields: Any) -> dict[str, Any]:
    """A `BlockRemoved` as on the wire."""
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium, **fields}


CLEARED = {"type": "AllBlocksCleared"}


def payload(*events: dict[str, Any], at_s: float = 1.0, dp_rank: int | None = 0) -> bytes:
    """A batch as on the wire."""
    return msgspec.msgpack.encode([at_s, list(events), dp_rank])


@dataclass
class _Block:
    parent: int | None = None
    key: tuple[int, ...] | None = None
    rooted: bool = False
    linked: bool = False


@dataclass
class Model:
    """The consolidator's rule, one Python object per claim."""

    claims: Counter[tuple[str, str, Tier, int, int]] = field(default_factory=Counter)
    blocks: dict[int, _Block] = field(default_factory=dict)

    def apply(self, source: str, event: dict[str, Any]) -> None:
        """One event of one publisher."""
        if event["type"] == "AllBlocksCleared":
            self.drop(source, Tier.GPU)
        elif event["type"] == "BlockStored":
            self._store(source, event)
        else:
            self._remove(source, event)

    def drop(self, source: str, tier: Tier | None = None) -> None:
        """A publisher's claims are void."""
        for claim in [claim for claim in self.claims if claim[0] == source and tier in (None, claim[2])]:
            del self.claims[claim]
        self._settle()

    def held(self) -> Held:
        """What consumers should hold."""
        return {(tier, group, block): self._chain(block) for _, _, tier, group, block in self.claims if self.blocks[block].rooted}

    def _store(self, source: str, event: dict[str, Any]) -> None:
        tier, owner, group = Tier[event["medium"]], event.get("ownership") or "", event.get("group_idx") or 0
        before = event["parent_block_hash"]
        for at, block in enumerate(event["block_hashes"]):
            entry = self.blocks.setdefault(block, _Block())
            if event["token_ids"] and entry.key is None:
                entry.parent, entry.key = before, tuple(event["token_ids"][BLOCK * at : BLOCK * (at + 1)])
            claim = source, owner, tier, group, block
            self.claims[claim] = self.claims[claim] + 1 if tier is not Tier.GPU else 1
            before = block
        self._settle()

    def _remove(self, source: str, event: dict[str, Any]) -> None:
        tier, owner, wanted = Tier[event["medium"]], event.get("ownership") or "", event.get("group_idx")
        for block in event["block_hashes"]:
            for group in {claim[3] for claim in self.claims} if wanted is None else {wanted}:
                claim = source, owner, tier, group, block
                if claim in self.claims:
                    self.claims[claim] -= 1
                    if not self.claims[claim]:
                        del self.claims[claim]
            self._settle()

    def _settle(self) -> None:
        held = {claim[4] for claim in self.claims}
        for block, entry in self.blocks.items():
            entry.rooted &= block in held
        while any(self._root(block, entry, held) for block, entry in self.blocks.items()):
            pass
        while gone := [block for block in self.blocks if block not in held and not self._needed(block)]:
            for block in gone:
                del self.blocks[block]

    def _root(self, block: int, entry: _Block, held: set[int]) -> bool:
        parent = None if entry.parent is None else self.blocks.get(entry.parent)
        ready = entry.key is not None and (entry.parent is None or (parent is not None and parent.rooted))
        changed = ready and block in held and not entry.rooted
        if changed:
            entry.rooted = entry.linked = True
        return changed

    def _needed(self, block: int) -> bool:
        return any(entry.linked and entry.parent == block for entry in self.blocks.values())

    def _chain(self, block: int) -> Key:
        entry = self.blocks[block]
        return entry.key, None if entry.parent is None else self._chain(entry.parent)


@dataclass
class Consumer:
    """Takes the stream as a router does, but forgives nothing: no orphan, no removal of what isn't there, no second store."""

    held: Held = field(default_factory=dict)

    def apply(self, raw: bytes) -> None:
        """One payload."""
        for event in decode(raw).events:
            if isinstance(event, AllBlocksCleared):
                self.held = {place: key for place, key in self.held.items() if place[0] is not Tier.GPU}
            elif isinstance(event, BlockStored):
                self._store(event)
            else:
                assert isinstance(event, BlockRemoved)
                for block in event.hashes.tolist():
                    del self.held[event.tier, event.group or 0, block]

    def _store(self, event: BlockStored) -> None:
        key = None if event.parent is None else self._key(event.parent)
        for at, block in enumerate(event.hashes.tolist()):
            content = tuple(event.tokens[BLOCK * at : BLOCK * (at + 1)].tolist())
            key = (content, key) if content else self._key(block)
            assert (event.tier, event.group, block) not in self.held
            self.held[event.tier, event.group, block] = key

    def _key(self, block: int) -> Key:
        found = [key for (_, _, known), key in self.held.items() if known == block]
        assert found, f"{block} is not held in any tier"
        return found[0]
