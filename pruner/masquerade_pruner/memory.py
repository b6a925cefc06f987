"""What a sculpt holds of memory at its peak, stage by stage: arithmetic over shapes, no torch and no weights.

What autograd keeps of a decoder block was read off its saved tensors (torch 2.13, transformers 5.23); what the
allocator and the libraries add was measured. `benchmarks/estimates.py` compares the sums with real runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from masquerade_engine.families import num_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MIB = 1024 * 1024
FORWARD_BATCH = 16  # branches of a pass without gradient: held_out.BATCH, and importance by activation
SELECT_BATCH = 32  # questions of a scoring pass: sensitivity.BATCH
HEAD_ROWS = 128  # losses.ROWS

# Of a process with torch, transformers and the pruner imported; and what the engine's compiled loops add.
_PROCESS_BYTES = 520 * MIB
_ENGINE_CODE_BYTES = 320 * MIB
_CUDA_CONTEXT_BYTES = 800 * MIB  # context, cuBLAS's workspaces: not measured here
_CUDA_PROCESS_BYTES = 3000 * MIB  # of the machine's memory, CUDA's libraries mapped: not measured here
_CUDA_FRAGMENTS = 1.08  # what the caching allocator holds over what is in use: not measured here


@dataclass(frozen=True, slots=True)
class Shape:
    """A base in numbers. Raises nothing: any Llama-like config has them."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding
    head_norms: bool  # queries and keys are normed (Qwen3)
    num_parameters: int
    item: int  # bytes of a weight
    cuda: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, item: int, *, cuda: bool) -> Shape:
        """The shape of a supported family's config with weights of `item` bytes."""
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            head_norms=config.model_type == "qwen3",
            num_parameters=num_parameters(config),
            item=item,
            cuda=cuda,
        )

    @property
    def weights(self) -> int:
        """Bytes of the base."""
        return self.num_parameters * self.item

    @property
    def looped(self) -> bool:
        """Whether activations and norms are compiled loops, which keep nothing but their inputs."""
        return not self.cuda and self.item <= 4

    @property
    def neurons(self) -> int:
        """FFN neurons of all layers."""
        return self.num_layers * self.intermediate

    @property
    def kv_token(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.item


@dataclass(frozen=True, slots=True)
class Workload:
    """The tokens and numbers of one sculpt that its memory follows from."""

    prompt: int  # tokens of the persona's turn, which all branches share
    question: int  # tokens of a long question with its share of the template
    answer: int  # tokens of an answer at most
    context_share: float  # of the branches, with a scene or earlier turns
    branches_per_step: int
    num_questions: int  # scored
    num_answers: int  # written
    num_held_out: int

    @property
    def longest(self) -> int:
        """Tokens of a chat with four earlier turns, the prompt included."""
        return self.prompt + 5 * (self.question + self.answer)

    def branch_tokens(self, branches: int) -> int:
        """Own tokens of so many branches of one pass: those with earlier turns are more than a mean pass has."""
        mean = self.context_share / 2 * branches
        turned = min(branches, math.ceil(mean + 2 * math.sqrt(mean)))
        turns = 4 if turned == 1 else 3
        return branches * (self.question + self.answer) + turned * turns * (self.question + self.answer)


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained beside the frozen base, and what autograd keeps of an FFN for it."""

    parameters: int
    token_bytes: int  # of an FFN, a token
    layer_bytes: int  # of an FFN, whatever the tokens: weights that were gathered for the pass


def mask_training(shape: Shape) -> Training:
    """Learning a mask."""
    return Training(shape.neurons, _activation_bytes(shape, shape.intermediate), 0)


def _activation_bytes(shape: Shape, neurons: int) -> int:
    """Of an FFN, a token: gate and up; without a loop silu of the gate and the product as well."""
    return (2 if shape.looped else 4) * neurons * shape.item


def recovery_training(kind: str, shape: Shape, kept: int, rank: int) -> Training:
    """`vectors` (gains and biases), `lora` (of gate, up and down, with vectors) or `full`; kept neurons alone run."""
    layers, hidden, item = shape.num_layers, shape.hidden, shape.item
    ffn, inputs = _activation_bytes(shape, kept), (hidden + kept) * item  # a trained linear keeps what it reads
    gathered = 3 * hidden * kept * item
    vectors = layers * (kept + hidden)
    if kind == "vectors":
        return Training(vectors, ffn, gathered)
    if kind == "lora":
        low_rank = layers * 3 * rank * (hidden + kept)
        return Training(vectors + low_rank, ffn + inputs + 3 * rank * item, gathered)
    return Training(layers * 3 * hidden * kept, ffn + inputs, gathered)


def learner_state(training: Training) -> int:
    """What is trained in fp32 with its gradient and two moments; the present and the best as they are stored."""
    return (16 + 8) * training.parameters


def checkpoint_bytes(training: Training) -> int:
    """Bytes of the machine's memory while a checkpoint is written, which copies it: masters, moments and the best."""
    return (12 + 2) * training.parameters


def block_saved(shape: Shape, tokens: int, prompt: int, branches: int, training: Training) -> int:
    """Bytes that autograd keeps of one decoder block, for a tree of `tokens` in `branches` around a prompt."""
    own = 1.2 * (tokens - prompt) / branches  # padded to the longest of a group
    heads, kv_heads, item = shape.num_heads, shape.num_kv_heads, shape.item
    normed = 2 * item if shape.looped else 8  # bytes of a value: the stream twice; without a loop in fp32
    norms = normed * shape.hidden * tokens
    if shape.head_norms:
        norms += normed * shape.head_dim * (heads + kv_heads) * tokens
    attention = (
        shape.head_dim
        * item
        * (
            (heads + 2 * kv_heads) * tokens  # queries, keys and values of the row
            + heads * prompt  # attended values of the prompt
            + 2 * heads * branches * own  # queries and attended values of the branches
            + 2 * kv_heads * branches * (prompt + own)  # what each branch sees
        )
    )
    return int(training.token_bytes * tokens + training.layer_bytes + norms + attention)


def attention_bias(shape: Shape, tokens: int, prompt: int, branches: int) -> int:
    """Bytes of the branches' attention masks, plain and folded over a group's query heads."""
    own = 1.2 * (tokens - prompt) / branches
    return int(branches * own * (prompt + own) * shape.item * (1 + shape.num_heads // shape.num_kv_heads))


def block_forward(shape: Shape, tokens: int) -> int:
    """Bytes of a block's own tensors while it runs without gradient."""
    return tokens * (4 * shape.intermediate * shape.item + 3 * shape.hidden * shape.item)


def head_chunk(shape: Shape, rows: int) -> int:
    """Bytes while a loss or divergence goes over the vocabulary in chunks of `HEAD_ROWS`."""
    chunk = min(rows, HEAD_ROWS) * shape.vocabulary * 4
    # Six tensors live at once. glibc's heap keeps as many again between chunks, but maps those above 32 MiB one by one.
    copies = 11 if not shape.cuda and chunk <= 32 * MIB else 6
    # oneDNN's packed head, or a float32 one where the processor multiplies that faster.
    packed_head = 0 if shape.cuda else shape.vocabulary * shape.hidden * max(4, shape.item)
    return copies * chunk + packed_head


def learning(shape: Shape, work: Workload, branches: int, *, checkpointing: bool, training: Training) -> int:
    """Peak bytes of a step beyond the weights and the learner's state, with so many branches a pass."""
    tokens = work.prompt + work.branch_tokens(branches)
    block = block_saved(shape, tokens, work.prompt, branches, training)
    stream = shape.num_layers * tokens * shape.hidden * shape.item
    # Of the first block little needs a gradient: nothing before its FFN is trained.
    first = training.layer_bytes + tokens * training.token_bytes // 4
    saved = stream if checkpointing else (shape.num_layers - 1) * block + first
    backward = (block if checkpointing else 0) + 5 * tokens * shape.intermediate * shape.item
    rows = branches * work.answer
    states = 4 * rows * shape.hidden * shape.item
    forward = max(block_forward(shape, tokens), head_chunk(shape, rows))
    return saved + states + attention_bias(shape, tokens, work.prompt, branches) + max(forward, backward)


def held_out(shape: Shape, work: Workload) -> int:
    """Bytes of the dense model's states and the masks of the held-out examples, and a pass over some of them."""
    tokens = work.prompt + work.branch_tokens(FORWARD_BATCH)
    rows = FORWARD_BATCH * work.answer
    batches = math.ceil(work.num_held_out / FORWARD_BATCH)
    kept = work.num_held_out * work.answer * shape.hidden * shape.item
    kept += batches * attention_bias(shape, tokens, work.prompt, FORWARD_BATCH)
    watched = 16 * tokens * shape.intermediate  # activations and their squares in fp64
    return kept + max(block_forward(shape, tokens) + watched, head_chunk(shape, rows))


def answer_states(shape: Shape, work: Workload) -> int:
    """Bytes of the machine's memory for the base's own states at every token of its answers."""
    return work.num_answers * work.answer * shape.hidden * shape.item


def unit_vectors(shape: Shape, work: Workload) -> int:
    """Bytes of the machine's memory for the questions' unit block outputs: the references' sum, and what is added."""
    return 4 * work.num_questions * shape.num_layers * shape.hidden * 4


def scoring(shape: Shape, work: Workload) -> int:
    """Bytes of a scoring pass beyond the weights."""
    tokens = work.prompt + SELECT_BATCH * work.question
    return block_forward(shape, tokens) + attention_bias(shape, tokens, work.prompt, SELECT_BATCH)


def answering(shape: Shape, work: Workload, streams: int, kv_tokens: int) -> int:
    """Bytes of the engine: its weights, keys and values of its streams, the prefix cache, a pass."""
    copied_head = shape.vocabulary * shape.hidden * shape.item if shape.tied and not shape.cuda else 0
    prefixes = 512 * MIB
    if not shape.cuda:  # both caches take memory for what is in them
        kv_tokens = streams * (work.prompt + 2 * (work.question + work.answer))
        prefixes = min(prefixes, work.num_answers * (work.question + work.answer) * shape.kv_token)
    logits = streams * shape.vocabulary * (shape.item + 3 * 4)
    layer = 3 * shape.hidden * shape.intermediate * shape.item
    rows = 512 + streams
    passing = max(logits + rows * 3 * shape.intermediate * shape.item, 2 * layer)
    return shape.weights + copied_head + kv_tokens * shape.kv_token + prefixes + passing


def compact_pack(shape: Shape, kept: int) -> int:
    """Bytes of the persona's own pack, which free-running answers use; the cache holds at most 512 MiB."""
    return min(512 * MIB, 3 * shape.num_layers * shape.hidden * kept * shape.item)


def process_bytes(shape: Shape, *, engine: bool) -> int:
    """What the device holds for the process itself."""
    if shape.cuda:
        return _CUDA_CONTEXT_BYTES
    return _PROCESS_BYTES + (_ENGINE_CODE_BYTES if engine else 0)


def fragments(shape: Shape) -> float:
    """What the allocator holds over what is in use, as a factor."""
    return _CUDA_FRAGMENTS if shape.cuda else 1.0


def host_bytes(shape: Shape, work: Workload, training: Training | None) -> int:
    """Bytes of the machine's memory beside a GPU; `training` is recovery's."""
    written = checkpoint_bytes(training) if training else 0
    return _CUDA_PROCESS_BYTES + max(unit_vectors(shape, work), answer_states(shape, work) + written)
