"""A persona's sub-network as a stock Hugging Face checkpoint with a smaller `intermediate_size`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from masquerade_engine.base import Base
from masquerade_engine.families import family_of
from masquerade_engine.seams import PersonaFFN, persona_ffns
from masquerade_masks import BaseMismatch, SettingError, SubNetwork
from masquerade_pruner.export.chat_template import template_in_character
from masquerade_pruner.export.model_card import write_model_card
from masquerade_pruner.export.persona import ExportedPersona
from masquerade_pruner.export.pruned_ffn import PROJECTIONS, PrunedFFN

_HOW = """\
```python
from transformers import pipeline

chat = pipeline("text-generation", "path/to/this/folder")
print(chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=80)[0]["generated_text"][-1]["content"])
```

Any other tool that reads a {model_type} checkpoint runs it as well, `vllm serve` among them.
"""


@torch.no_grad()
def export_checkpoint(
    base: Base,
    subnetwork: SubNetwork,
    out_dir: Path,
    persona: ExportedPersona,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the sub-network to `out_dir`, loadable by plain transformers; return `out_dir`.

    `dtype` is by default that of the base's own checkpoint: float32 for a GGUF file, whose weights no narrower form
    holds exactly. Where its prompt is known, the persona is in the chat template. Raises `BaseMismatch`, and
    `SettingError` for a directory that is not empty or for biases where the family's MLP has none.
    """
    check_base(base, subnetwork)
    bias_key = family_of(base.config).mlp_bias_key
    if subnetwork.bias is not None and bias_key is None:
        raise SettingError(
            "format",
            f"this persona has biases, and the MLP of a {base.config.model_type} checkpoint has no place for them; "
            "export a version recovered without biases",
        )
    check_empty(out_dir)
    chosen = dtype or getattr(base.config, "dtype", None) or torch.float32
    model: Any = base.build_model(chosen)
    pruned = PrunedFFN(subnetwork)
    biases = subnetwork.biases()
    for layer, ffn in enumerate(persona_ffns(model)):
        for projection in PROJECTIONS:
            linear = ffn.get_submodule(projection)
            linear.weight = _frozen(pruned.weight(layer, projection, linear.get_parameter("weight")).to(chosen))
        if biases is not None:
            _add_biases(ffn, torch.from_numpy(biases[layer]).to(chosen))
    model.config.intermediate_size = subnetwork.mask.kept
    if biases is not None:
        setattr(model.config, str(bias_key), True)
    model.generation_config.eos_token_id = sorted(base.stop_token_ids)
    model.save_pretrained(out_dir)
    _strip_attention_name(out_dir / "config.json")
    in_character = _write_tokenizer(base, out_dir, persona.system_prompt)
    write_model_card(
        out_dir,
        base,
        subnetwork,
        persona,
        what=f"A persona of {base.name}: the base without the FFN neurons that this character does without.",
        how=_HOW.format(model_type=base.config.model_type),
        tags=["persona", "pruned"],
        template_in_character=in_character,
    )
    return out_dir


def check_base(base: Base, subnetwork: SubNetwork) -> None:
    """Raise `BaseMismatch` for a sub-network of another base."""
    if subnetwork.base != base.fingerprint:
        raise BaseMismatch(base.fingerprint, subnetwork.base)


def check_empty(out_dir: Path) -> None:
    """Raise `SettingError` for a file, or a directory with something in it."""
    if out_dir.is_file():
        raise SettingError("target", f"{out_dir} is a file; name a new folder")
    if out_dir.exists() and any(out_dir.iterdir()):
        raise SettingError("target", f"{out_dir} is not empty; name a new folder")


def _add_biases(ffn: PersonaFFN, bias: torch.Tensor) -> None:
    """A family with MLP biases has them on all three projections."""
    kept = ffn.gate_proj.get_parameter("weight").shape[0]
    ffn.gate_proj.bias = _frozen(torch.zeros(kept, dtype=bias.dtype))
    ffn.up_proj.bias = _frozen(torch.zeros(kept, dtype=bias.dtype))
    ffn.down_proj.bias = _frozen(bias)


def _write_tokenizer(base: Base, out_dir: Path, system_prompt: str | None) -> bool:
    """Whether its template is in character."""
    base.tokenizer.save_pretrained(out_dir)
    template = None if system_prompt is None else template_in_character(base.tokenizer, system_prompt)
    if template is None:
        return False
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(out_dir, local_files_only=True)  # a copy: the base's own stays
    tokenizer.chat_template = template
    tokenizer.save_pretrained(out_dir)
    return True


def _frozen(weight: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.contiguous(), requires_grad=False)


def _strip_attention_name(config: Path) -> None:
    """The checkpoint must not ask for this project's attention, should a transformers release write it down."""
    settings = json.loads(config.read_text("utf-8"))
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        settings.pop(key, None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
