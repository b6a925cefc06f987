from __future__ import annotations

import random

from masquerade_engine.prefix_index import BLOCK, NewBlocks, PrefixIndex

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
