"""Export: a persona in the forms that other tools run, with none of this project's code in them.

| form | module | what runs it |
| --- | --- | --- |
| a Hugging Face checkpoint with a smaller `intermediate_size` | `checkpoint` | transformers, vLLM, SGLang, converters |
| a GGUF file with a smaller `feed_forward_length` | `gguf_file` | llama.cpp and what embeds it |
| a PEFT adapter | `adapter` | PEFT |
"""

from masquerade_pruner.export.adapter import export_adapter
from masquerade_pruner.export.checkpoint import export_checkpoint
from masquerade_pruner.export.gguf_file import TensorType, export_gguf
from masquerade_pruner.export.persona import ExportedPersona

__all__ = [
    "ExportedPersona",
    "TensorType",
    "export_adapter",
    "export_checkpoint",
    "export_gguf",
]
