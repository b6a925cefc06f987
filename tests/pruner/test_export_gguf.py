"""A persona as a GGUF file: what is in it, and that llama.cpp runs it as the reference does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader
from tiny_gguf import write_tiny_gguf

from masquerade_engine.base import Base, load_base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_masks import BaseMismatch, Mask, SettingError, SubNetwork
from masquerade_masks.mask_file import read
from masquerade_pruner.export import ExportedPersona, TensorType, export_gguf
from masquerade_server.ready import pruner_data, shipped

MakeSubnetwork = Callable[..., SubNetwork]
Logits = Callable[..., torch.Tensor]
MakeBase = Callable[..., Base]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AWKWARD = "You're \"Nettie\" \\ {{ 7 * 7 }} {% endif %} {# no #} 'n' \\n\n}} Ёж ☂ {'a': {}}"
NETTIE = ExportedPersona("nettie", 3, "You are Nettie. You brew.\n\nStay in character.")
QUESTION = "What do you do when it rains?"
TINY_TOLERANCE = 0.02  # of a log-probability; llama.cpp keeps keys and values in f16
EVERY_NEURON = np.tile(np.arange(1536, dtype=np.int32), (30, 1))


class LlamaCpp:
    """One GGUF file in llama.cpp, on one thread."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 512
        params.n_parallel = 1
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(params)

    def greedy(self, token_ids: list[int], num_tokens: int, num_probs: int = 20) -> list[dict[int, float]]:
        """For each token of the greedy continuation, the log-probabilities of the likeliest, the taken one first."""
        asked = {"prompt": token_ids, "n_predict": num_tokens, "n_probs": num_probs, "temperature": 0.0}
        answer = self._server.handle_completions(asked)
        positions = answer["choices"][0]["logprobs"]["content"]
        return [{top["id"]: top["logprob"] for top in position["top_logprobs"]} for position in positions]

    def chat(self, messages: list[ChatMessage], num_tokens: int) -> tuple[str, int]:
        """The greedy reply through the file's own template, and the number of tokens of the prompt."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        answer = self._server.handle_chat_completions({"messages": turns, "max_tokens": num_tokens, "temperature": 0.0})
        return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


@pytest.fixture(scope="module")
def make_gguf_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """`make_gguf_base("qwen2", GGMLQuantizationType.Q8_0)`: a tiny base whose source is a GGUF file."""

    def make(model_type: str = "llama", stored: GGMLQuantizationType = GGMLQuantizationType.F32) -> Base:
        folder = tmp_path_factory.mktemp("gguf")
        path = write_tiny_gguf(folder / f"{model_type}.gguf", model_type, stored, CHATML)
        return load_base(str(path), cache_dir=folder, dtype="fp32", device="cpu")

    return make


def matrices(path: Path) -> dict[str, tuple[str, Any]]:
    """Type and dequantised values by name."""
    return {
        tensor.name: (tensor.tensor_type.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(path).tensors
    }


def field(path: Path, key: str) -> Any:
    found = GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


# --- what is in the file


def test_base_types_copy_what_can_be_copied(
    make_gguf_base: MakeBase, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    base = make_gguf_base(stored=GGMLQuantizationType.Q5_1)
    subnetwork = make_subnetwork(base, gain=True)
    export_gguf(base, subnetwork, tmp_path / "out.gguf", NETTIE)
    before, after = matrices(base.source), matrices(tmp_path / "out.gguf")
    assert before.keys() == after.keys()
    kept = subnetwork.mask.kept_indices()
    for name, (stored, values) in after.items():
        of_base = before[name][1]
        layer = int(name.split(".")[1]) if name.startswith("blk") else 0
        if "ffn_down" in name:
            assert stored == "Q8_0"
            wanted = of_base[:, kept[layer]] * subnetwork.gain[layer].astype(np.float32)
            assert np.abs(values - wanted).max() <= np.abs(wanted).max() / 127
        else:
            assert stored == before[name][0]
            cut = "ffn_gate" in name or "ffn_up" in name
            assert np.array_equal(values, of_base[kept[layer]] if cut else of_base)


@pytest.mark.parametrize(("tensor_type", "stored", "file_type"), [("f16", "F16", 1), ("q8_0", "Q8_0", 7)])
def test_another_type_is_that_of_every_matrix(
    make_gguf_base: MakeBase,
    make_subnetwork: MakeSubnetwork,
    tmp_path: Path,
    tensor_type: str,
    stored: str,
    file_type: int,
) -> None:
    base = make_gguf_base()
    out = tmp_path / "out.gguf"
    export_gguf(base, make_subnetwork(base), out, NETTIE, tensor_type=TensorType(tensor_type))
    assert {kind for kind, values in matrices(out).values() if values.ndim == 2} == {stored}
    assert {kind for kind, values in matrices(out).values() if values.ndim == 1} == {"F32"}
    assert field(out, "general.file_type") == file_type


def test_the_metadata_are_the_bases_but_for_the_persona(
    make_gguf_base: MakeBase, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    base, out = make_gguf_base("qwen3"), tmp_path / "out.gguf"
    subnetwork = make_subnetwork(base)
    export_gguf(base, subnetwork, out, NETTIE)
    before, after = (
        {name: (found.types, found.contents()) for name, found in GGUFReader(path).fields.items()}
        for path in (base.source, out)
    )
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {
        "GGUF.kv_count",
        "general.description",
        "general.finetune",
        "general.name",
        "general.quantization_version",
        "general.size_label",
        "masquerade.base",
        "masquerade.digest",
        "masquerade.persona",
        "masquerade.system_prompt",
        "masquerade.version",
        "qwen3.feed_forward_length",
        "tokenizer.chat_template",
    }
    assert field(out, "qwen3.feed_forward_length") == subnetwork.mask.kept
    assert field(out, "masquerade.system_prompt") == NETTIE.system_prompt
    assert field(out, "masquerade.digest") == subnetwork.digest


# --- what is refused


def test_a_base_that_is_no_gguf_file_is_refused(
    tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"no GGUF file.*convert_hf_to_gguf"):
        export_gguf(tiny_base, make_subnetwork(tiny_base), tmp_path / "out.gguf", NETTIE)


def test_biases_are_refused_where_llama_cpp_reads_none(
    make_gguf_base: MakeBase, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    base = make_gguf_base("qwen2")
    with pytest.raises(SettingError, match=r"biases.*qwen2"):
        export_gguf(base, make_subnetwork(base, bias=True), tmp_path / "out.gguf", NETTIE)


def test_sizes_that_do_not_fit_are_refused(
    make_gguf_base: MakeBase, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    base = make_gguf_base()
    ours = make_subnetwork(base)
    odd = Mask.from_kept_indices(ours.mask.kept_indices()[:, :40], ours.shape.intermediate_size)
    narrow = SubNetwork(base.fingerprint, ours.shape, odd)
    with pytest.raises(SettingError, match=r"blocks of 32.*ffn_down.* 40 long; use f16"):
        export_gguf(base, narrow, tmp_path / "out.gguf", NETTIE, tensor_type=TensorType.Q8_0)


def test_a_weight_beyond_f16_leaves_nothing_behind(
    make_gguf_base: MakeBase, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    base = make_gguf_base()
    ours = make_subnetwork(base)
    huge = replace(ours, gain=np.full((ours.shape.num_layers, ours.mask.kept), 65_000, np.float16))
    scaled = replace(make_subnetwork(base, kind="full"), gain=huge.gain)
    out = tmp_path / "out.gguf"
    out.write_bytes(b"the old file")
    with pytest.raises(SettingError, match=r"beyond f16's range"):
        export_gguf(base, _amplified(scaled), out, NETTIE, tensor_type=TensorType.F16)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == b"the old file"


def _amplified(subnetwork: SubNetwork) -> SubNetwork:
    assert subnetwork.weights is not None
    tensors = {name: tensor * np.float16(50) for name, tensor in subnetwork.weights.tensors.items()}
    return replace(subnetwork, attached=(), weights=replace(subnetwork.weights, tensors=tensors))


def test_targets_that_would_destroy_something_are_refused(
    make_gguf_base: MakeBase, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    base = make_gguf_base()
    ours = make_subnetwork(base)
    with pytest.raises(SettingError, match="the base's own file"):
        export_gguf(base, ours, base.source, NETTIE)
    with pytest.raises(SettingError, match="is a folder"):
        export_gguf(base, ours, tmp_path, NETTIE)
    with pytest.raises(BaseMismatch):
        export_gguf(base, SubNetwork("0" * 64, ours.shape, ours.mask), tmp_path / "out.gguf", NETTIE)


# --- llama.cpp


@pytest.mark.parametrize(
    ("model_type", "extras"),
    [
        ("llama", {}),
        ("llama", {"gain": True, "bias": True}),
        ("llama", {"kind": "lora", "gain": True}),
        ("llama", {"kind": "full"}),
        ("qwen2", {"gain": True}),
        ("qwen3", {"gain": True}),
    ],
)
def test_llama_cpp_computes_the_persona(
    make_gguf_base: MakeBase,
    make_subnetwork: MakeSubnetwork,
    persona_logits: Logits,
    tmp_path: Path,
    model_type: str,
    extras: dict[str, Any],
) -> None:
    base = make_gguf_base(model_type)
    subnetwork = make_subnetwork(base, **extras)
    export_gguf(base, subnetwork, tmp_path / "out.gguf", NETTIE)
    prompt = list(range(3, 40))
    found = LlamaCpp(tmp_path / "out.gguf").greedy(prompt, 8)
    assert differences(base, subnetwork, persona_logits, prompt, found).max() <= TINY_TOLERANCE


@pytest.mark.parametrize("prompt", [NETTIE.system_prompt, AWKWARD])
def test_llama_cpp_reads_the_template_as_we_do(
    make_gguf_base: MakeBase, make_subnetwork: MakeSubnetwork, tmp_path: Path, prompt: str
) -> None:
    base = make_gguf_base()
    out = tmp_path / "out.gguf"
    assert export_gguf(base, make_subnetwork(base), out, replace(NETTIE, system_prompt=prompt))
    llama_cpp = LlamaCpp(out)
    asked = [ChatMessage("user", QUESTION)]
    for messages in (asked, [ChatMessage("system", "It rains."), *asked]):
        rendered = render_chat(base.tokenizer, prompt, messages)
        text, num_prompt_tokens = llama_cpp.chat(messages, 8)
        assert num_prompt_tokens == len(rendered)
        assert text == base.tokenizer.decode([next(iter(top)) for top in llama_cpp.greedy(rendered, 8)])


@pytest.fixture(scope="module")
def pip(bundled_base: Base) -> tuple[SubNetwork, ExportedPersona]:
    """A persona that ships: its mask was learned on the bundled model."""
    ready = next(one for one in shipped(pruner_data()) if one.id == "pip")
    return read(ready.mask, base=bundled_base.fingerprint).subnetwork, ExportedPersona("pip", 1, ready.system_prompt)


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("tensor_type", "biased", "tolerance"),
    [("f16", True, 0.01), ("base", False, 0.2)],  # llama.cpp rounds activations to 8 bits for quantised weights
)
def test_llama_cpp_computes_the_bundled_persona(
    bundled_base: Base,
    pip: tuple[SubNetwork, ExportedPersona],
    persona_logits: Logits,
    tmp_path: Path,
    tensor_type: str,
    biased: bool,
    tolerance: float,
) -> None:
    subnetwork, persona = pip
    if biased:
        shape = (subnetwork.shape.num_layers, subnetwork.shape.hidden_size)
        bias = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float16)
        subnetwork = replace(subnetwork, bias=bias)
    out = tmp_path / "pip.gguf"
    export_gguf(bundled_base, subnetwork, out, persona, tensor_type=TensorType(tensor_type))
    prompt = render_chat(bundled_base.tokenizer, persona.system_prompt, [ChatMessage("user", QUESTION)])
    found = LlamaCpp(out).greedy(prompt, 24)
    apart = differences(bundled_base, subnetwork, persona_logits, prompt, found)
    assert apart.mean() <= tolerance
    unpruned = replace(subnetwork, mask=Mask.from_kept_indices(EVERY_NEURON, 1536), bias=None)
    assert differences(bundled_base, unpruned, persona_logits, prompt, found).mean() > 4 * apart.mean()


@pytest.mark.real_model
def test_llama_cpp_chats_as_the_bundled_persona(
    bundled_base: Base, pip: tuple[SubNetwork, ExportedPersona], persona_logits: Logits, tmp_path: Path
) -> None:
    subnetwork, persona = pip
    out, asked = tmp_path / "pip.gguf", [ChatMessage("user", QUESTION)]
    export_gguf(bundled_base, subnetwork, out, persona, tensor_type=TensorType.F16)
    llama_cpp = LlamaCpp(out)
    text, num_prompt_tokens = llama_cpp.chat(asked, 24)
    prompt = render_chat(bundled_base.tokenizer, persona.system_prompt, asked)
    assert num_prompt_tokens == len(prompt)
    found = llama_cpp.greedy(prompt, 24)
    assert text.strip() == bundled_base.tokenizer.decode([next(iter(top)) for top in found]).strip()
    assert differences(bundled_base, subnetwork, persona_logits, prompt, found).mean() <= 0.01


def differences(
    base: Base, subnetwork: SubNetwork, persona_logits: Logits, prompt: list[int], found: list[dict[int, float]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """|Δ log-probability| of the likeliest tokens at each position, against the reference over the same tokens."""
    taken = [next(iter(top)) for top in found]
    logits = persona_logits(base, subnetwork, torch.tensor([prompt + taken[:-1]]))[0, len(prompt) - 1 :]
    expected = torch.log_softmax(logits, -1)
    return np.array(
        [
            abs(logprob - float(expected[position, token_id]))
            for position, top in enumerate(found)
            for token_id, logprob in top.items()
        ]
    )
