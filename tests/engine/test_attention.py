from __future__ import annotations

import random

from masquerade_engine.attention import Span, decode_tiles


def spans(lengths: dict[int, int]) -> list[Span]:
    return [Span(slot, row, 1, num_keys - 1) for row, (slot, num_keys) in enumerate(sorted(lengths.items()))]


def test_neighbours_of_like_length_attend_together() -> None:
    (tile,) = decode_tiles(spans({0: 200, 1: 220, 2: 210}))
    assert (tile.lo, tile.hi, tile.num_keys) == (0, 3, 220)


def test_a_long_conversation_stands_alone() -> None:
    tiles = decode_tiles(spans({0: 200, 1: 210, 2: 8000, 3: 190}))
    assert [(tile.lo, tile.hi, tile.num_keys) for tile in tiles] == [(0, 2, 210), (2, 3, 8000), (3, 4, 190)]


def test_a_small_hole_is_read_and_a_large_one_is_not() -> None:
    assert len(decode_tiles(spans({0: 200, 2: 200}))) == 1
    assert len(decode_tiles(spans({0: 200, 31: 200}))) == 2


def test_no_rows_need_no_tiles() -> None:
    assert decode_tiles([]) == []


def test_every_span_is_in_the_tile_that_covers_it() -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths = {slot: draw.choice([5, 100, 3000]) for slot in draw.sample(range(32), draw.randrange(1, 32))}
        made = spans(lengths)
        tiles = decode_tiles(made)
        assert [span for tile in tiles for span in tile.spans] == made
        assert all(
            tile.lo <= span.slot < tile.hi and span.num_keys <= tile.num_keys for tile in tiles for span in tile.spans
        )
