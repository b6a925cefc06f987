"""Select: which questions bring a persona out, by hidden-state divergence from the reference personas.

s(q; P) = 1/(B r) sum_b sum_j (1 - cos(h_b(q|P_j), h_b(q|P))), h the last prompt token's state after block b
(Persona-Pruner, section 3; arXiv 2606.14695). The sum over references is linear in the unit vectors, so their mean per
(question, block) is computed once per base and kept; a new persona then costs one forward pass a question.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, persona_system_prompt, render_chat
from masquerade_engine.seams import decoder_layers
from masquerade_pruner.instructions import Instruction, InstructionSet
from masquerade_pruner.tree import TreeContext, head_weight, plant, run_tree

BATCH = 32  # questions a pass; the persona prompt is run once in each
FORMAT = "masquerade.references/1"


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference persona."""

    id: str
    name: str
    text: str

    @property
    def system_prompt(self) -> str:
        """The prompt as a served persona of this text would have it."""
        return persona_system_prompt(self.name, self.text)


def load_references() -> list[Reference]:
    """The reference personas that ship with the project."""
    text = (resources.files("masquerade_pruner") / "data" / "references.json").read_text("utf-8")
    return [Reference(**row) for row in json.loads(text)]


@dataclass(frozen=True, slots=True)
class ReferencePass:
    """Per question id, the mean over references of the unit block outputs, `[blocks, hidden]` fp32."""

    mean_units: dict[str, torch.Tensor]

    def sensitivity(self, question_id: str, units: torch.Tensor) -> float:
        """s(q; P) of one question from the persona's unit block outputs `[blocks, hidden]`; 0 is no divergence."""
        return float(1.0 - (units * self.mean_units[question_id]).sum(dim=-1).mean())


def reference_pass(
    base: Base,
    model: Callable[[], torch.nn.Module],
    instructions: InstructionSet,
    cache_dir: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReferencePass:
    """The base's reference pass: shipped, cached, or run now and cached (about two minutes on two cores)."""
    key = _key(base, instructions)
    shipped = resources.files("masquerade_pruner") / "data" / f"references-{key[:16]}.safetensors"
    cached = cache_dir / "references" / f"{key}.safetensors"
    for candidate in (Path(str(shipped)), cached):
        if candidate.is_file():
            return _load(candidate, key)
    mean_units = _run_references(base, model(), _all(instructions), on_progress)
    cached.parent.mkdir(parents=True, exist_ok=True)
    _save(cached, key, mean_units)
    return _load(cached, key)


def persona_units(
    base: Base,
    model: torch.nn.Module,
    system_prompt: str,
    questions: Sequence[Instruction],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """Unit block outputs at each question's last prompt token, `[questions, blocks, hidden]` fp32."""
    prompts = [question_prompt(base, system_prompt, one.text) for one in questions]
    parts = []
    for start in range(0, len(prompts), BATCH):
        parts.append(_unit_block_outputs(model, prompts[start : start + BATCH]))
        on_progress(min(start + BATCH, len(prompts)), len(prompts))
    return torch.cat(parts)


def select(
    scored: Sequence[tuple[Instruction, float]], *, keep_fraction: float, topic_cap: float
) -> list[tuple[Instruction, float]]:
    """The most sensitive `keep_fraction` of the questions, at most `topic_cap` of those kept from one topic."""
    wanted = max(1, round(keep_fraction * len(scored)))
    topics = {one.topic for one, _ in scored}
    # With few topics the cap would leave fewer than wanted: it never goes below an equal share.
    cap = max(math.ceil(topic_cap * wanted), math.ceil(wanted / max(1, len(topics))))
    taken: dict[str, int] = {}
    kept: list[tuple[Instruction, float]] = []
    for one, score in sorted(scored, key=lambda pair: (-pair[1], pair[0].id)):
        if len(kept) == wanted:
            break
        if taken.get(one.topic, 0) < cap:
            taken[one.topic] = taken.get(one.topic, 0) + 1
            kept.append((one, score))
    return kept


def question_prompt(base: Base, system_prompt: str | None, question: str) -> list[int]:
    """A single question as it is served."""
    return render_chat(base.tokenizer, system_prompt, [ChatMessage("user", question)])


def _all(instructions: InstructionSet) -> list[Instruction]:
    return [*instructions.train, *instructions.validation, *instructions.test]


@torch.no_grad()
def _unit_block_outputs(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    head = head_weight(model)
    tree = plant(prompts, head.device, head.dtype)
    with _captured_blocks(model, tree.last) as captured:
        run_tree(model, tree, TreeContext(tree))
    return F.normalize(torch.stack(captured, dim=1).float(), dim=-1).cpu()


@contextmanager
def _captured_blocks(model: torch.nn.Module, rows: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Collect the decoder blocks' raw outputs at `rows`; transformers' last `hidden_states` entry is already normed."""
    captured: list[torch.Tensor] = []

    def capture(_module: object, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        captured.append(states[0].index_select(0, rows))

    hooks = [block.register_forward_hook(capture) for block in decoder_layers(model)]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def _run_references(
    base: Base,
    model: torch.nn.Module,
    questions: Sequence[Instruction],
    on_progress: Callable[[int, int], None],
) -> dict[str, torch.Tensor]:
    references = load_references()
    total = torch.zeros(())
    for index, reference in enumerate(references):
        units = persona_units(base, model, reference.system_prompt, questions)
        total = total + units / len(references)
        on_progress(index + 1, len(references))
    return {one.id: mean for one, mean in zip(questions, total, strict=True)}


def _key(base: Base, instructions: InstructionSet) -> str:
    references = [(one.id, one.system_prompt) for one in load_references()]
    parts = [FORMAT, base.fingerprint, instructions.digest, json.dumps(references)]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def _save(path: Path, key: str, mean_units: dict[str, torch.Tensor]) -> None:
    """Stored as int8 with one scale a vector: its error, under 0.5 % of a unit, is far below the spread of scores."""
    stacked = torch.stack(list(mean_units.values()))  # [questions, blocks, hidden]
    scale = stacked.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    tensors = {"mean_units": (stacked / scale).round().to(torch.int8), "scale": scale.squeeze(-1)}
    scratch = path.with_suffix(".part")
    save_file(tensors, scratch, {"format": FORMAT, "key": key, "questions": json.dumps(list(mean_units))})
    scratch.replace(path)


def _load(path: Path, key: str) -> ReferencePass:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["key"] != key:
            raise ValueError(f"{path.name} holds another base's or instruction set's reference pass")
        values = file.get_tensor("mean_units").float() * file.get_tensor("scale")[..., None]
    return ReferencePass(dict(zip(json.loads(metadata["questions"]), values, strict=True)))
