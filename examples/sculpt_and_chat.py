"""Create a persona, watch its mask being learned, then compare its sub-network with the unpruned base.

python examples/sculpt_and_chat.py examples/personas/lighthouse-keeper.txt "Osric Venn"
"""

import sys
from pathlib import Path

from masquerade_client import Masquerade

text = Path(sys.argv[1]).read_text("utf-8")
name = sys.argv[2]

with Masquerade() as client:
    sculpt = client.personas.sculpt(name=name, text=text, sparsity=0.25)
    for event in sculpt:
        print(event.type, event.stage, event.completed, event.total, event.eta_s)
    persona = sculpt.result()
    for model in (persona.id, f"{persona.id}@dense"):
        reply = client.chat.complete(model, "What did you see last night?", max_tokens=60, seed=1)
        print(f"\n{model}: {reply.text}")
