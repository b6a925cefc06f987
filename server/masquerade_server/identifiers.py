"""Ids made from names."""

from __future__ import annotations

import re
import unicodedata

MAX_ID_CHARS = 63


def id_from_name(name: str) -> str:
    """`Élise d'Arc` as `elise-d-arc`; empty for a name without Latin letters or digits."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:MAX_ID_CHARS].strip("-")
