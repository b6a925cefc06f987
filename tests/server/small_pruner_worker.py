"""A worker process with the real pruner on few questions and references: a sculpt in seconds."""

from __future__ import annotations

import sys

import masquerade_pruner  # the package's `sculpt` is a function; its module is looked up below
from masquerade_pruner import sensitivity
from masquerade_pruner.instructions import InstructionSet, load_instructions
from masquerade_server import worker

assert masquerade_pruner
sculpting = sys.modules["masquerade_pruner.sculpt"]
every, references = load_instructions(), sensitivity.load_references()
few = InstructionSet(every.train[::40], every.validation[::30], every.test[::30])
sculpting.load_instructions = lambda path=None: few  # type: ignore[attr-defined]
sensitivity.load_references = lambda: references[:2]

if __name__ == "__main__":
    worker.main()
