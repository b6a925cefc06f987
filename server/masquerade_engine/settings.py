"""The engine's settings and figures: plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from masquerade_masks import SettingError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Every bound of the engine. dtype and device are the base's.

    Raises `SettingError` naming the field that is out of range.
    """

    max_num_seqs: int = 32  # sequences that run at once: KV slots
    max_model_len: int | None = None  # tokens a sequence; None: the base's context, or what `kv_cache_bytes` holds
    prefill_chunk: int = 512  # prompt tokens a step
    max_queue: int = 256  # requests that wait beyond those that run
    kv_cache_bytes: int = 8192 * MIB  # address space of the slots; on the CPU only touched pages take memory
    prefix_cache_bytes: int = 512 * MIB  # 0: no prefix reuse
    pack_cache_bytes: int = 512 * MIB  # compact packs; 0: everything stays on the dense pack

    def __post_init__(self) -> None:
        for field, least in (
            ("max_num_seqs", 1),
            ("max_model_len", 2),
            ("prefill_chunk", 1),
            ("max_queue", 0),
            ("kv_cache_bytes", 1),
            ("prefix_cache_bytes", 0),
            ("pack_cache_bytes", 0),
        ):
            value = getattr(self, field)
            if value is not None and value < least:
                raise SettingError(field, f"must be at least {least}, not {value}")

    def resolve_max_model_len(self, context_length: int, kv_bytes_per_token: int) -> int:
        """Tokens a slot holds. Raises `SettingError` where an explicit length cannot be had."""
        fits = self.kv_cache_bytes // (self.max_num_seqs * kv_bytes_per_token)
        wanted = self.max_model_len or min(context_length, fits)
        if wanted > context_length:
            raise SettingError("max_model_len", f"{wanted} is above the base's context of {context_length} tokens")
        if wanted > fits or wanted < 2:
            needed = max(wanted, 2) * self.max_num_seqs * kv_bytes_per_token
            raise SettingError(
                "kv_cache_bytes",
                f"{self.max_num_seqs} sequences of {max(wanted, 2)} tokens need {needed} bytes, "
                f"and {self.kv_cache_bytes} are allowed",
            )
        return wanted


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's state now and its totals since the start."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_prompt_tokens: int  # of admitted requests
    num_cached_tokens: int  # of these, read from the prefix cache
    num_output_tokens: int
    num_compact_packs: int
    compact_pack_bytes: int
