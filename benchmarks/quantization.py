"""How far int8 weights move the model: KL to the bf16 weights, and top-1 agreement.

    python benchmarks/quantization.py --out benchmarks/results/quantization.md

Every answer is written by the bf16 engine under a persona of its own, and read teacher-forced by both formats, the
whole chat in chunks as a server would. KL is the mean over the answers' tokens of KL(bf16 || format), in nats. The
bf16 compact pack against the bf16 dense one shows what rounding alone does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from machine import machine
from serving import CACHE_DIR
from town import Character, character, prompt

from masquerade_engine import Engine, EngineSettings, PersonaFunction, Request, SamplingParams, load_base
from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.sequence import Batch, Chunk
from masquerade_engine.sequence import Sequence as EngineSequence
from masquerade_engine.threads import available_cores
from masquerade_masks.mask_file import decode
from masquerade_server.ready import pruner_data, shipped

Chat = tuple[PersonaFunction, tuple[int, ...], tuple[int, ...]]  # who, prompt, answer


def main() -> None:
    """Write answers, read them with each format, print."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(cache_dir=options.cache_dir, dtype="bf16")
    one_slot = EngineSettings(max_num_seqs=options.chats, max_model_len=1024, pack_cache_bytes=0)
    with Engine(base, one_slot) as engine:
        chats = written(engine, options.chats, options.tokens)
        expected = [answer_logprobs(engine, chat) for chat in chats]
        again = [answer_logprobs(engine, chat, chunk=64) for chat in chats]
    rows = [_row("bf16, the prompt in other chunks", expected, again)]
    with Engine(
        base, EngineSettings(max_num_seqs=1, max_model_len=1024, pack_cache_bytes=0, quantization="int8")
    ) as engine:
        rows.append(_row("int8", expected, [answer_logprobs(engine, chat) for chat in chats]))
    table = "\n".join(
        [
            "# Weight formats against bf16",
            "",
            f"`python benchmarks/quantization.py` on {machine()}",
            "",
            f"{base.name}; {len(chats)} chats of {options.tokens} answered tokens, in turn on the base and on the",
            "ready personas' masks. KL in nats a token, with its 95 % interval over chats.",
            "",
            "| weights | KL | 95 % interval | largest of a chat | top-1 agreement |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def written(engine: Engine, num_chats: int, num_tokens: int) -> list[Chat]:
    """Sampled answers."""
    base = engine.base
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.8, ignore_eos=True)
    ready = shipped(pruner_data())
    requests = []
    for i in range(num_chats):
        if i % 2 and ready:
            one = ready[i // 2 % len(ready)]
            subnetwork = decode(one.mask.read_bytes(), base=base.fingerprint, shape=base.shape).subnetwork
            who, function = Character(one.name, one.text), PersonaFunction(subnetwork.digest, "town", subnetwork)
        else:
            who, function = character(base, i), PersonaFunction(f"base:{base.fingerprint}", "town")
        requests.append(Request(str(i), tuple(prompt(base, who, i)), function, sampling))
    results = engine.generate_all(requests)
    return [(request.function, request.prompt, results[request.id].token_ids) for request in requests]


def answer_logprobs(engine: Engine, chat: Chat, chunk: int = 512) -> torch.Tensor:
    """Log-probabilities `[num_answered, vocab]` of what follows each prefix, one decoding step a token."""
    function, asked, answer = chat
    request = Request("read", asked + answer, function, SamplingParams(max_tokens=1))
    sequence = EngineSequence(request, Detokenizer(lambda ids: ""), slot=0)
    rows, start = [], 0
    stops = [*range(chunk, len(asked), chunk), *range(len(asked), len(asked) + len(answer))]
    for stop in stops:
        logits = engine.runner.logits(Batch((Chunk(sequence, start, stop - start, True),)))[0]
        start = stop
        if stop >= len(asked):
            rows.append(logits.float().log_softmax(dim=-1))
    return torch.stack(rows)


def _row(name: str, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> str:
    kl = np.array([float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(expected, found, strict=True)])
    same = np.mean([float((p.argmax(-1) == q.argmax(-1)).float().mean()) for p, q in zip(expected, found, strict=True)])
    draws = np.random.default_rng(0).choice(kl, (10_000, len(kl))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"| {name} | {kl.mean():.5f} | {low:.5f} to {high:.5f} | {kl.max():.5f} | {same:.1%} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (%(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
