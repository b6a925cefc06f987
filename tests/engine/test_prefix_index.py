from __future__ import annotations

import random

import pytest

from masquerade_engine.prefix_index import BLOCK, NewBlocks, PrefixIndex
from masquerade_masks import SettingError

HERE = ("digest", "cast")


def tokens(num_blocks: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(100), k=num_blocks * BLOCK)


def test_what_was_inserted_is_matched_up_to_its_last_whole_block() -> None:
    index = PrefixIndex(8)
    new = index.insert(HERE, [*tokens(3), 1, 2])
    assert new.start == 0
    assert len(new.blocks) == 3
    assert index.match(HERE, [*tokens(3), 9]) == new.blocks
    assert index.match(HERE, tokens(3)[: BLOCK + 5]) == new.blocks[:1]


def test_one_token_is_left_to_compute() -> None:
    index = PrefixIndex(8)
    new = index.insert(HERE, tokens(2))
    assert index.match(HERE, tokens(2)) == new.blocks[:1]


def test_a_longer_prompt_adds_its_own_blocks_only() -> None:
    index = PrefixIndex(8)
    first = index.insert(HERE, tokens(2))
    second = index.insert(HERE, [*tokens(2), *tokens(1, seed=7)])
    assert second.start == 2 * BLOCK
    assert len(second.blocks) == 1
    assert index.match(HERE, [*tokens(2), *tokens(1, seed=7), 0]) == first.blocks + second.blocks


def test_nothing_is_shared_between_digests_or_casts() -> None:
    index = PrefixIndex(8)
    index.insert(HERE, tokens(2))
    assert index.match(("other", "cast"), [*tokens(2), 0]) == ()
    assert index.match(("digest", "other"), [*tokens(2), 0]) == ()


def test_the_oldest_leaf_goes_first_and_parents_outlive_children() -> None:
    index = PrefixIndex(4)
    shared = tokens(2)
    kept = index.insert(HERE, [*shared, *tokens(1, seed=1)]).blocks
    index.insert(HERE, [*shared, *tokens(1, seed=2)])
    index.match(HERE, [*shared, *tokens(1, seed=1), 0])
    index.insert(HERE, [*shared, *tokens(1, seed=3)])
    assert index.match(HERE, [*shared, *tokens(1, seed=2), 0]) == kept[:2]
    assert index.match(HERE, [*shared, *tokens(1, seed=1), 0]) == kept


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    index = PrefixIndex(3)
    index.insert(HERE, tokens(1, seed=9))
    new = index.insert(HERE, tokens(5))
    assert len(new.blocks) == 3
    assert index.match(HERE, [*tokens(5), 0]) == new.blocks


def test_no_blocks_at_all_is_no_cache() -> None:
    index = PrefixIndex(0)
    assert index.insert(HERE, tokens(2)) == NewBlocks(0, ())
    assert index.match(HERE, tokens(2)) == ()


def test_a_cleared_index_has_room_for_everything_again() -> None:
    index = PrefixIndex(3)
    index.insert(HERE, tokens(3))
    index.clear()
    assert len(index) == 0
    assert index.match(HERE, [*tokens(3), 0]) == ()
    assert len(index.insert(HERE, tokens(3, seed=4)).blocks) == 3


def test_a_block_never_belongs_to_two_prefixes() -> None:
    index = PrefixIndex(6)
    draw = random.Random(0)
    content: dict[int, tuple[int, ...]] = {}  # what a runner would have written: the prefix up to the block's end
    for _ in range(400):
        prompt = [part for _ in range(draw.randrange(1, 5)) for part in tokens(1, seed=draw.randrange(3))]
        for position, block in enumerate(index.match(HERE, [*prompt, 0])):
            assert content[block] == tuple(prompt[: (position + 1) * BLOCK])
        new = index.insert(HERE, prompt)
        for position, block in enumerate(new.blocks):
            content[block] = tuple(prompt[: new.start + (position + 1) * BLOCK])


def test_a_limit_may_take_every_block() -> None:
    index = PrefixIndex(8)
    new = index.insert(HERE, tokens(2))
    assert index.match(HERE, tokens(2), 2 * BLOCK) == new.blocks
    assert index.match(HERE, [*tokens(2), 1, 2], BLOCK + 1) == new.blocks[:1]


def test_spared_blocks_are_not_evicted() -> None:
    index = PrefixIndex(2)
    spared = index.insert(HERE, tokens(2)).blocks
    assert index.insert(HERE, tokens(2, seed=1), spare=spared) == NewBlocks(0, ())
    assert index.match(HERE, [*tokens(2), 0]) == spared


def test_pinned_blocks_stay_and_the_others_go() -> None:
    index = PrefixIndex(4)
    pinned = index.insert(HERE, tokens(2)).blocks
    index.pin(HERE, [*tokens(2), 1, 2, 3])
    for seed in range(1, 9):
        index.insert(HERE, tokens(4, seed=seed))
    assert index.match(HERE, [*tokens(2), 0]) == pinned
    assert (index.num_pinned, index.num_reusable, len(index)) == (2, 2, 4)
    index.unpin(HERE)
    index.insert(HERE, tokens(4, seed=9))
    assert index.match(HERE, [*tokens(2), 0]) == ()
    assert index.num_pinned == 0


def test_what_is_cached_after_its_pin_is_pinned() -> None:
    index = PrefixIndex(8)
    index.pin(HERE, tokens(3))
    index.insert(HERE, [*tokens(1), *tokens(3, seed=1)])  # shares the pin's first block
    assert index.num_pinned == 1
    index.insert(HERE, [*tokens(3), *tokens(2, seed=1)])
    assert index.num_pinned == 3
    index.clear()
    assert index.num_pinned == 0
    index.insert(HERE, tokens(3))
    assert index.num_pinned == 3


def test_at_most_half_of_the_cache_is_pinned_and_shared_blocks_count_once() -> None:
    index = PrefixIndex(8)
    index.pin(HERE, tokens(3))
    index.pin(HERE, tokens(3))
    index.pin(HERE, [*tokens(2), *tokens(1, seed=1)])
    with pytest.raises(SettingError, match=f"{BLOCK} more tokens cannot be pinned: {4 * BLOCK} are") as refused:
        index.pin(("other", "cast"), tokens(1))
    assert refused.value.field == "pin"
    index.unpin(HERE)
    index.pin(("other", "cast"), tokens(4))


def test_a_forgotten_function_is_dropped_in_every_cast_and_nothing_else_is() -> None:
    index = PrefixIndex(12)
    elsewhere, other = (HERE[0], "elsewhere"), ("other", HERE[1])
    for namespace in (HERE, elsewhere, other):
        index.pin(namespace, tokens(1))
        index.insert(namespace, tokens(2))
    index.forget(HERE[0])
    assert (len(index), index.num_pinned) == (2, 1)
    assert index.match(HERE, [*tokens(2), 0]) == index.match(elsewhere, [*tokens(2), 0]) == ()
    assert len(index.match(other, [*tokens(2), 0])) == 2
    index.pin(HERE, tokens(5))  # nothing is left of the old pins
    index.forget("unheard of")


def test_any_mix_of_uses_keeps_blocks_apart_and_the_trie_whole() -> None:
    index = PrefixIndex(10)
    draw = random.Random(1)
    names = [(digest, cast) for digest in ("x", "y") for cast in ("a", "b")]
    content: dict[int, tuple[object, ...]] = {}
    refused = 0
    for _ in range(4000):
        namespace = draw.choice(names)
        prompt = [part for _ in range(draw.randrange(1, 5)) for part in tokens(1, seed=draw.randrange(3))]
        match draw.randrange(10):
            case 0:
                index.forget(namespace[0])
            case 1:
                index.unpin(namespace)
            case 2:
                try:
                    index.pin(namespace, prompt)
                except SettingError:
                    refused += 1
            case _:
                for position, block in enumerate(index.match(namespace, [*prompt, 0])):
                    assert content[block] == (namespace, *prompt[: (position + 1) * BLOCK])
                new = index.insert(namespace, prompt)
                for position, block in enumerate(new.blocks):
                    content[block] = (namespace, *prompt[: new.start + (position + 1) * BLOCK])
        blocks = {*index._unpinned, *index._pinned}
        assert len(blocks) == len(index) == 10 - len(index._free)
        assert blocks.isdisjoint(index._free)
        for block, entry in {**index._unpinned, **index._pinned}.items():
            parent = entry.key[0]
            assert content[block][:-BLOCK] == (content[parent] if isinstance(parent, int) else (parent,))
        assert index.num_pinned <= 5
    assert refused > 20
