"""The pruner: from persona text to a learned mask with its report."""

from masquerade_pruner.estimate import estimate
from masquerade_pruner.plan import Execution, Plan
from masquerade_pruner.presets import PRESETS, SculptSettings, SculptSpec
from masquerade_pruner.progress import Progress
from masquerade_pruner.rewriting import Chat, ChatModel, Reply
from masquerade_pruner.sculpt import SculptResult, answered, sculpt

__all__ = [
    "PRESETS",
    "Chat",
    "ChatModel",
    "Execution",
    "Plan",
    "Progress",
    "Reply",
    "SculptResult",
    "SculptSettings",
    "SculptSpec",
    "answered",
    "estimate",
    "sculpt",
]
