"""The README of an exported checkpoint or adapter."""

from __future__ import annotations

import json
from pathlib import Path

from masquerade_engine.base import Base
from masquerade_masks import SubNetwork
from masquerade_pruner.export.persona import ExportedPersona

_PROMPT = """\
## The persona's prompt

The neurons were chosen under this system prompt, and every chat needs it. {where}

{quoted}
"""


def write_model_card(
    folder: Path,
    base: Base,
    subnetwork: SubNetwork,
    persona: ExportedPersona,
    *,
    what: str,
    how: str,
    tags: list[str],
    template_in_character: bool = False,
) -> None:
    """Write `README.md`: what it is (`what`), how it is run (`how`, Markdown), and the persona's prompt."""
    mask = subnetwork.mask
    sections = [
        _front_matter(base, tags),
        f"# {persona.id}, version {persona.version}\n",
        f"{what}\n",
        "| | |\n| --- | --- |\n"
        f"| base | {base.name}, fingerprint `{base.fingerprint}` |\n"
        f"| FFN neurons kept | {mask.kept} of {mask.intermediate_size} in each of {mask.num_layers} layers "
        f"({mask.sparsity:.1%} sparser) |\n"
        f"| mask | `{subnetwork.digest}` |\n",
        f"## How to run it\n\n{how}\n",
    ]
    if persona.system_prompt is not None:
        where = (
            "The chat template puts it first by itself."
            if template_in_character
            else "Pass it as the first system message."
        )
        sections.append(_PROMPT.format(where=where, quoted=_quoted(persona.system_prompt)))
    sections.append("The base's licence applies.\n")
    (folder / "README.md").write_text("\n".join(sections), "utf-8")


def _front_matter(base: Base, tags: list[str]) -> str:
    """Values as JSON strings, which YAML reads."""
    listed = "".join(f"\n- {tag}" for tag in ["masquerade", *tags])
    return f"---\nbase_model: {json.dumps(base.name)}\npipeline_tag: text-generation\ntags:{listed}\n---\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
