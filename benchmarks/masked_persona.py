"""A persona that a mask serves, and other masks of the same size for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from masquerade_client import Masquerade, Persona
from masquerade_engine.base import Base, load_base
from masquerade_engine.prompt import prompt_sha256
from masquerade_masks import Mask, MaskFile, MaskHeader, SubNetwork, mask_file, round_kept
from masquerade_server.settings import resolve_settings

_NAME = "Nettie"
_TEXT = "You are Nettie, a ferrywoman with a slow boat and a quick tongue. You answer in proverbs of your own making."


def masked_persona(client: Masquerade, cache_dir: Path) -> Persona:
    """The first persona that a mask serves; on a base without ready personas, one with a random mask."""
    for persona in client.personas.list():
        if persona.serving == "mask":
            return persona
    persona = client.personas.create(name=_NAME, text=_TEXT, sculpt=False)
    base = load_base(resolve_settings().model, cache_dir=cache_dir)
    kept = round_kept(base.shape.intermediate_size, 0.25)
    scores = np.random.default_rng(0).random((base.shape.num_layers, base.shape.intermediate_size))
    mask = Mask.from_kept_indices(scores.argsort(axis=1)[:, :kept], base.shape.intermediate_size)
    return upload(client, persona, base, mask)


def upload(client: Masquerade, persona: Persona, base: Base, mask: Mask) -> Persona:
    """Have the server's persona answer under a mask that nothing was learned for."""
    header = MaskHeader(persona.id, 1, "none", prompt_sha256(persona.system_prompt or ""))
    content = MaskFile(SubNetwork(base.fingerprint, base.shape, mask), header)
    return client.personas.upload_mask(persona.id, mask_file.encode(content))


def other_mask(content: MaskFile, seed: int) -> MaskFile:
    """The mask with a tenth of its kept neurons in each layer exchanged for dropped ones."""
    rng = np.random.default_rng(seed)
    dense = content.subnetwork.mask.to_dense().copy()  # [layers, intermediate]
    kept = content.subnetwork.mask.kept
    num_moved = max(1, min(kept // 10, dense.shape[1] - kept))
    for layer in dense:
        leave = rng.choice(np.flatnonzero(layer), num_moved, replace=False)
        enter = rng.choice(np.flatnonzero(~layer), num_moved, replace=False)
        layer[leave], layer[enter] = False, True
    # Gains belong to the neurons that were there.
    return replace(content, subnetwork=replace(content.subnetwork, mask=Mask.from_dense(dense), gain=None))
