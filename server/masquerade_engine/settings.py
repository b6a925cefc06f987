"""The engine's settings and figures: plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from masquerade_masks import SettingError

MIB = 1024 * 1024

Quantization = Literal["none", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Every bound of the engine. dtype and device are the base's.

    Raises `SettingError` naming the field that is out of range.
    """

    max_num_seqs: int = 32  # sequences that run at once: KV slots
    max_model_len: int | None = None  # tokens a sequence; None: the base's context, or what `kv_cache_bytes` holds
    prefill_chunk: int = 512  # prompt tokens a step
    max_queue: int = 256  # requests of a priority that wait beyond `max_num_seqs`
    kv_cache_bytes: int = 8192 * MIB  # keys and values of the running sequences
    prefix_cache_bytes: int = 512 * MIB  # 0: no prefix reuse
    pack_cache_bytes: int = 512 * MIB  # compact and cast packs; 0: everything stays on the dense pack
    quantization: Quantization = "none"  # of the weights
    enforce_eager: bool = False  # no CUDA graphs
    load_timeout_s: float = 30.0  # that a request waits for its persona's own FFN weights

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
        if not self.load_timeout_s > 0:
            raise SettingError("load_timeout_s", f"must be above 0 seconds, not {self.load_timeout_s:g}")
        if self.quantization not in QUANTIZATIONS:
            raise SettingError("quantization", f"{self.quantization!r} is not one of {', '.join(QUANTIZATIONS)}")

    def resolve_max_model_len(self, context_length: int, kv_bytes_per_token: int, *, lazy_slots: bool) -> int:
        """Tokens a slot holds. `lazy_slots`: a slot takes memory for the tokens in it, not for all it could hold.

        Raises `SettingError` where an explicit length cannot be had.
        """
        num_full = 1 if lazy_slots else self.max_num_seqs  # sequences of full length that the bytes must hold
        fits = self.kv_cache_bytes // (num_full * kv_bytes_per_token)
        wanted = self.max_model_len or min(context_length, fits)
        if wanted > context_length:
            raise SettingError("max_model_len", f"{wanted} is above the base's context of {context_length} tokens")
        if wanted > fits or wanted < 2:
            needed = max(wanted, 2) * num_full * kv_bytes_per_token
            sequences = "1 sequence" if num_full == 1 else f"{num_full} sequences"
            raise SettingError(
                "kv_cache_bytes",
                f"{sequences} of {max(wanted, 2)} tokens need {needed} bytes, and {self.kv_cache_bytes} are allowed",
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
    num_preempted: int  # times that a running sequence gave its slot back, to go on later
    num_deadline: int  # requests ended by their deadline
    num_prefix_blocks: int  # in the prefix cache
    num_pinned_prefix_blocks: int  # of these, kept from eviction
    max_prefix_blocks: int
    num_packs: int  # resident, of personas and of casts
    pack_bytes: int  # of these and of those that are being made
