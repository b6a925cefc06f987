"""transformers' batched `generate`, left padded, and with `adapters` PEFT's mixed-adapter batch on top of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from worker import Result, Run, serve

_RANK = 16


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when each step's tokens were there."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def open_engine(settings: dict[str, Any]) -> Callable[[Run], Result]:
    """The dense model in bf16, with one random adapter a persona where `adapters` names the linears to adapt."""
    chosen = settings["engine"]
    model = AutoModelForCausalLM.from_pretrained(
        settings["path"], dtype=getattr(torch, chosen["dtype"]), attn_implementation=chosen["attention"]
    ).eval()
    model.generation_config.eos_token_id = None  # every answer has its full length
    if chosen.get("adapters"):
        model = _adapted(model, chosen["adapters"], settings["personas"])

    @torch.inference_mode()
    def run(asked: Run) -> Result:
        torch.manual_seed(asked.seed)
        longest = max(map(len, asked.prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in asked.prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked.prompts]
        clock = Clock()
        names = {"adapter_names": [_name(one) for one in asked.personas]} if chosen.get("adapters") else {}
        started = time.perf_counter()
        model.generate(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            generation_config=generation_config(asked.num_tokens, asked.temperature, asked.top_p),
            stopping_criteria=StoppingCriteriaList([clock]),
            **names,
        )
        return Result.of(asked, started, [clock.moments] * len(asked.prompts))

    return run


def generation_config(num_tokens: int, temperature: float, top_p: float, **more: Any) -> GenerationConfig:
    """Greedy at temperature 0, otherwise sampled, with no bound on the number of candidates."""
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how = sampled if temperature else {"do_sample": False}
    return GenerationConfig(max_new_tokens=num_tokens, pad_token_id=0, **how, **more)


def _adapted(model: Any, targets: str | list[str], count: int) -> Any:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (optional)

    config = LoraConfig(r=_RANK, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, adapter_name=_name(0))
    for persona in range(1, count):
        adapted.add_adapter(_name(persona), config)
    return adapted.eval()


def _name(persona: int) -> str:
    return f"persona-{persona}"


if __name__ == "__main__":
    serve(open_engine)
