from __future__ import annotations

import pytest
import torch

from masquerade_engine.kv_cache import KVCache, KVGeometry, lazy_zeros
from masquerade_engine.prefix_index import BLOCK

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


def test_blocks_go_out_and_come_back_in_another_slot() -> None:
    kv = KVCache(GEOMETRY, num_slots=2, max_len=4 * BLOCK, num_blocks=5, device=CPU)
    for layer in range(2):
        kv.keys[layer][0].normal_()
        kv.values[layer][0].normal_()
    kv.store(0, BLOCK, [4, 1])
    kv.load(1, 0, [1])
    kv.load(1, 2 * BLOCK, [4])
    for layer in range(2):
        for cache in (kv.keys[layer], kv.values[layer]):
            assert torch.equal(cache[1, :, :BLOCK], cache[0, :, 2 * BLOCK : 3 * BLOCK])
            assert torch.equal(cache[1, :, 2 * BLOCK : 3 * BLOCK], cache[0, :, BLOCK : 2 * BLOCK])
            assert cache[1, :, BLOCK : 2 * BLOCK].abs().sum() == 0


def test_untouched_memory_is_not_resident() -> None:
    psutil = pytest.importorskip("psutil")
    before = psutil.Process().memory_info().rss
    zeros = lazy_zeros((1 << 30,), torch.uint8, CPU)
    zeros[: 1 << 20] = 1
    assert int(zeros[-10:].sum()) == 0
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_a_token_takes_keys_and_values_of_all_layers() -> None:
    assert GEOMETRY.bytes_per_token == 2 * 2 * 3 * 4 * 4
