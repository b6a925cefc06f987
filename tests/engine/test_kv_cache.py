from __future__ import annotations

import pytest
import torch

from masquerade_engine.kv_cache import KVCache, KVGeometry, LazyZeros, slots_are_lazy
from masquerade_engine.prefix_index import BLOCK
from masquerade_masks import SettingError

CPU = torch.device("cpu")
GEOMETRY = KVGeometry(num_layers=2, num_kv_heads=3, head_dim=4, dtype=torch.float32)


def test_tokens_are_written_to_their_slots_and_positions() -> None:
    kv = KVCache(GEOMETRY, num_slots=4, max_len=10, num_blocks=0, device=CPU)
    key, value = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    kv.write(1, kv.rows([2, 0], [5, 9]), key, value)
    assert torch.equal(kv.keys[1][2, :, 5], key[:, 0])
    assert torch.equal(kv.values[1][0, :, 9], value[:, 1])
    assert int((kv.keys[1] != 0).sum()) == key.numel()
    assert int((kv.keys[0] != 0).sum()) == 0


def test_tokens_of_the_first_slots_are_written_and_those_of_nobody_are_not() -> None:
    kv = KVCache(GEOMETRY, num_slots=4, max_len=10, num_blocks=0, device=CPU)
    rows = kv.rows_by_slot(torch.tensor([7, -1, 0, -1]))
    listed = kv.rows([0, 2], [7, 0]).view(3, 2)
    assert torch.equal(rows.view(3, 4)[:, [0, 2]], listed)
    key, value = torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    kv.write(1, rows, key, value)
    for slot, position in ((0, 7), (2, 0)):
        assert torch.equal(kv.keys[1][slot, :, position], key[:, slot])
        assert torch.equal(kv.values[1][slot, :, position], value[:, slot])
    assert int((kv.keys[1] != 0).sum()) == int((kv.values[1] != 0).sum()) == 2 * 3 * 4
    assert int((kv.keys[0] != 0).sum()) == 0


def test_blocks_go_out_and_come_back_in_another_slot() -> None:
    kv = KVCache(GEOMETRY, num_slots=2, max_len=4 * BLOCK, num_blocks=5, device=CPU)
    for layer in range(2):
        kv.keys[layer][0].normal_()
        kv.values[layer][0].normal_()
    kv.store(0, BLOCK, [4, 1, 2])
    kv.load(1, 0, [1, 4])
    kv.load(1, 2 * BLOCK, [1, 2])
    for layer in range(2):
        for cache in (kv.keys[layer], kv.values[layer]):
            assert torch.equal(cache[1, :, :BLOCK], cache[0, :, 2 * BLOCK : 3 * BLOCK])
            assert torch.equal(cache[1, :, BLOCK : 2 * BLOCK], cache[0, :, BLOCK : 2 * BLOCK])
            assert torch.equal(cache[1, :, 2 * BLOCK :], cache[0, :, 2 * BLOCK :])


def test_untouched_memory_is_not_resident() -> None:
    psutil = pytest.importorskip("psutil")
    before = psutil.Process().memory_info().rss
    zeros = LazyZeros((1 << 30,), torch.uint8, CPU).tensor
    zeros[: 1 << 20] = 1
    assert int(zeros[-10:].sum()) == 0
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_a_token_takes_keys_and_values_of_all_layers() -> None:
    assert GEOMETRY.bytes_per_token == 2 * 2 * 3 * 4 * 4


def test_a_trimmed_slot_gives_its_memory_back_and_keeps_its_beginning() -> None:
    psutil = pytest.importorskip("psutil")
    rss = psutil.Process().memory_info
    geometry = KVGeometry(num_layers=4, num_kv_heads=2, head_dim=64, dtype=torch.float32)
    kv = KVCache(geometry, num_slots=3, max_len=5000, num_blocks=0, device=CPU)  # 1.3 MB a head: not in whole pages
    before = rss().rss
    for layer in range(4):
        kv.keys[layer].fill_(1.0)
        kv.values[layer].fill_(2.0)
    full = rss().rss - before
    kv.trim(1, 1000, 5000)
    freed = before + full - rss().rss
    slot = 4 * 2 * 2 * 5000 * 64 * 4  # bytes: layers, K and V, heads, tokens, head_dim, float32
    assert full > 2.9 * slot
    assert 0.7 * slot < freed < 0.9 * slot
    for cache, filled in ((kv.keys, 1.0), (kv.values, 2.0)):
        for layer in range(4):
            assert bool((cache[layer][[0, 2]] == filled).all())
            assert bool((cache[layer][1, :, :1000] == filled).all())
            assert bool(cache[layer][1].isfinite().all())


def test_more_than_the_machine_has_may_be_mapped_but_not_more_than_can_be_addressed() -> None:
    if not slots_are_lazy(CPU):
        pytest.skip("slots are real memory here")
    zeros = LazyZeros((1 << 40,), torch.uint8, CPU).tensor
    zeros[1 << 39] = 1
    with pytest.raises(SettingError, match="max_model_len"):
        LazyZeros((1 << 60,), torch.uint8, CPU)
