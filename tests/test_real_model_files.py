"""Files in the forms in which models are published are accepted: no check refuses what other programs write.

The files are made here, with the names, sizes and settings of published ones and with small vocabularies.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from damaged_files import pack_value, write_gguf
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from cooper_jax.configs import tiny
from cooper_jax.model import gguf, gguf_tokenizer, tokenizer_files, weight_files
from cooper_jax.model.config import ModelConfig, find_config_problems
from cooper_jax.model.json_object import parse_json, read_json
from cooper_jax.model.rope import LinearScaling, RopeScaling
from cooper_jax.model.tokenizer import load_tokenizer_from
from cooper_jax.model.weights import _is_classifier
from cooper_jax.settings import bounds

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def sizes(vocab: int, width: int, ffn: int, layers: int, heads: int, kv_heads: int, length: int) -> dict:
    """The sizes of a config.json."""
    return dict(
        vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length,
    )  # fmt: skip


# Model -> (model_type, the fields that it sets, as transformers 4 names them).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2 7B": ("llama", sizes(32000, 4096, 11008, 32, 32, 32, 4096) | dict(rope_scaling=None)),
    "Llama 3.2 1B": (
        "llama",
        sizes(128256, 2048, 8192, 16, 32, 8, 131072)
        | dict(
            head_dim=64, rope_theta=500000.0, rope_scaling=LLAMA3, tie_word_embeddings=True, bos_token_id=128000,
            eos_token_id=[128001, 128008, 128009], rms_norm_eps=1e-5,
        ),
    ),
    "Llama 3 8B of a million tokens": (
        "llama",
        sizes(128256, 4096, 14336, 32, 32, 8, 4194304) | dict(rope_theta=45845400000.0),
    ),
    "Llama, linear": (
        "llama",
        sizes(32000, 4096, 11008, 32, 32, 32, 16384) | dict(rope_scaling={"type": "linear", "factor": 4}),
    ),
    "TinyLlama": ("llama", sizes(32000, 2048, 5632, 22, 32, 4, 2048) | dict(rope_scaling=None)),
    "SmolLM2 135M": (
        "llama",
        sizes(49152, 576, 1536, 30, 9, 3, 8192)
        | dict(rope_theta=100000, tie_word_embeddings=True, rope_interleaved=False, is_llama_config=True),
    ),
    "a random test model": ("llama", sizes(99, 8, 32, 2, 4, 2, 512) | dict(pad_token_id=-1)),
    "Qwen2.5 0.5B": (
        "qwen2",
        sizes(151936, 896, 4864, 24, 14, 2, 32768)
        | dict(
            rope_theta=1000000.0, use_sliding_window=False, sliding_window=32768, max_window_layers=21,
            tie_word_embeddings=True, use_mrope=False,
        ),
    ),
    "Qwen2.5 1.5B": (
        "qwen2",
        sizes(151936, 1536, 8960, 28, 12, 2, 131072) | dict(sliding_window=131072, max_window_layers=28),
    ),
    "Qwen2.5 7B of a million tokens": (
        "qwen2",
        sizes(152064, 3584, 18944, 28, 28, 4, 1010000)
        | dict(rope_theta=10000000.0, sliding_window=32768, max_window_layers=28),
    ),
    "R1 Distill Qwen 7B": (
        "qwen2",
        sizes(152064, 3584, 18944, 28, 28, 4, 131072)
        | dict(rope_theta=10000, use_mrope=False, attention_bias=True),
    ),
    "Qwen3 0.6B": (
        "qwen3",
        sizes(151936, 1024, 3072, 28, 16, 8, 40960)
        | dict(
            head_dim=128, rope_theta=1000000, sliding_window=None, max_window_layers=28, attention_bias=False,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen3 8B": ("qwen3", sizes(151936, 4096, 12288, 36, 32, 8, 40960) | dict(max_window_layers=36)),
    "Mistral 7B v0.1": ("mistral", sizes(32000, 4096, 14336, 32, 32, 8, 32768) | dict(sliding_window=4096)),
    "Mistral 7B v0.3": (
        "mistral",
        sizes(32768, 4096, 14336, 32, 32, 8, 32768)
        | dict(sliding_window=None, rope_theta=1000000.0, head_dim=None),
    ),
    "Mistral Nemo": (
        "mistral",
        sizes(131072, 5120, 14336, 40, 32, 8, 1024000) | dict(sliding_window=None, head_dim=128),
    ),
    "SmolLM3 3B": (
        "smollm3",
        sizes(128256, 2048, 11008, 36, 16, 4, 65536)
        | dict(
            no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, rope_theta=5000000.0,
            layer_types=["full_attention"] * 36, sliding_window=None, use_sliding_window=False,
            max_window_layers=28, eos_token_id=128012, pad_token_id=128004, bos_token_id=128000,
        ),
    ),
    "Gemma 3 1B": (
        "gemma3_text",
        sizes(262144, 1152, 6912, 26, 4, 1, 32768)
        | dict(
            head_dim=256, rope_theta=1000000, rope_local_base_freq=10000, sliding_window=512,
            sliding_window_pattern=6, query_pre_attn_scalar=256, final_logit_softcapping=None,
            attn_logit_softcapping=None, cache_implementation="hybrid", eos_token_id=[1, 106],
        ),
    ),
    "Gemma 3 270M": (
        "gemma3_text",
        sizes(262144, 640, 2048, 18, 4, 1, 32768)
        | dict(
            head_dim=256, sliding_window=512, _sliding_window_pattern=6, use_bidirectional_attention=False,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        ),
    ),
}  # fmt: skip
CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "smollm3": transformers.SmolLM3Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}


def write_version_4(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 4 writes it: without defaults, with nulls."""
    activation = "hidden_activation" if family == "gemma3_text" else "hidden_act"
    common = {
        "_name_or_path": "", "architectures": [CLASSES[family].__name__.replace("Config", "ForCausalLM")],
        "attention_dropout": 0.0, activation: "gelu_pytorch_tanh" if family == "gemma3_text" else "silu",
        "auto_map": {"AutoConfig": "configuration.Config"}, "bos_token_id": None, "eos_token_id": 2,
        "initializer_range": 0.02, "model_type": family, "pad_token_id": None, "rms_norm_eps": 1e-06,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.3", "use_cache": True, "pretraining_tp": 1,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "quantization_config": None, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    return common | fields


def write_version_5(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The same as the installed version of transformers writes it, with all defaults."""
    return CLASSES[family](**fields).to_dict()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("write", [write_version_4, write_version_5])
def test_config(name, write):
    family, fields = MODELS[name]
    if write is write_version_5:
        fields = {key: value for key, value in fields.items() if value != -1}
    hf = parse_json(json.dumps(write(family, fields)).encode(), "config.json")
    assert find_config_problems(hf) == []
    config = ModelConfig.from_hf(hf)
    assert (config.vocab_size, config.max_len) == (fields["vocab_size"], fields["max_position_embeddings"])
    assert config.kv_heads == fields["num_key_value_heads"]
    if "rope_theta" in fields:
        assert config.rope_theta == fields["rope_theta"]
    window = {"Mistral 7B v0.1": 4096, "Gemma 3 1B": 512, "Gemma 3 270M": 512}
    assert config.window == window.get(name)
    scaling = {"Llama 3.2 1B": RopeScaling(32.0, 1.0, 4.0, 8192), "Llama, linear": LinearScaling(4.0)}
    assert config.rope_scaling == scaling.get(name)
    if family == "smollm3":
        assert config.layer_types.count("unrotated") == 9


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "attention_factor": 0.1},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": None},
    ],
)
def test_the_tokenizer_of_a_model_with_another_rope_scaling_can_be_read(scaling):
    """The model is not built, but its tokenizer may be that of another."""
    family, fields = MODELS["Qwen2.5 1.5B"]
    hf = write_version_4(family, fields | {"rope_scaling": scaling})
    assert find_config_problems(hf) == []
    with pytest.raises(ValueError, match="only default, linear and llama3 are supported"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize("factor, is_supported", [(1.0, True), (1, True), (0.5, False)])
def test_rotation_of_a_part_of_the_dimensions_is_refused_wherever_it_is_written(factor, is_supported):
    """Version 4 of transformers has the key at the top level, version 5 within rope_parameters."""
    family, fields = MODELS["Llama 3.2 1B"]
    older = write_version_4(family, fields) | {"partial_rotary_factor": factor}
    newer = write_version_5(family, fields)
    newer["rope_parameters"]["partial_rotary_factor"] = factor
    for hf in (older, newer):
        if is_supported:
            assert ModelConfig.from_hf(hf).rope_scaling is not None
        else:
            with pytest.raises(ValueError, match="partial_rotary_factor.*0.5"):
                ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    "generation",
    [
        {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
         "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"bos_token_id": 151643, "do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048},
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096, "temperature": 0.6},
        {"cache_implementation": "hybrid", "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0,
         "top_k": 64, "top_p": 0.95, "do_sample": True, "transformers_version": "4.50.0.dev0"},
        {"bos_token_id": None, "eos_token_id": None, "temperature": None, "output_attentions": False},
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
    ],
)  # fmt: skip
def test_generation_config(generation, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert weight_files.read_generation_config(tmp_path, {}) == generation
    assert not {*map(str, tokenizer_files.read_eos_ids(tmp_path))} & {"None", "-1"}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"metadata": None},
        {"metadata": {}},
        {"metadata": {"total_size": 16}},
        {"metadata": {"total_size": 16.0, "total_parameters": 4, "mergekit_version": "0.0.4"}},
    ],
)
def test_index_of_weights(metadata, tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensor in zip(names, ["model.embed_tokens.weight", "lm_head.weight"], strict=True):
        save_file({tensor: np.zeros((2, 2), np.float32)}, tmp_path / name, {"format": "pt"})
    weight_map = {"model.embed_tokens.weight": names[0], "lm_head.weight": names[1]}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(metadata | {"weight_map": weight_map}))
    assert weight_files.open_safetensors(tmp_path).shapes.keys() == weight_map.keys()


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("ForSequenceClassification", {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}),
        ("ForSequenceClassification", {"id2label": {"0": "reward"}, "problem_type": "regression"}),
        ("ForSequenceClassification", {"num_labels": 1}),
        ("ForSequenceClassification", {"num_labels": 1, "id2label": None, "pad_token_id": 0}),
        ("ForCausalLM", {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "num_labels": 2}),
        ("ForCausalLM", {}),
    ],
)
def test_head(head, labels):
    """Reward models as transformers, TRL and launch/export.py write them, and language models."""
    for name in ("Qwen2.5 1.5B", "Llama 3.2 1B", "Mistral 7B v0.3", "Qwen3 0.6B", "SmolLM3 3B"):
        family, fields = MODELS[name]
        known = CLASSES[family].__name__.replace("Config", head)
        hf = write_version_4(family, fields | {"architectures": [known]})
        del hf["id2label"]
        assert _is_classifier(hf | labels, Path("config.json")) == (head != "ForCausalLM")
    # As the installed version of transformers writes it.
    hf = transformers.Qwen2Config(architectures=[f"Qwen2{head}"], num_labels=1).to_dict()
    assert _is_classifier(hf, Path("config.json")) == (head != "ForCausalLM")


# --- tokenizers --------------------------------------------------------------------------------------


def token(content: str, number: int, special: bool = True) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=special)
    return {"id": number, "content": content, **flags}


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = {character: i for i, character in enumerate(ALPHABET)} | {"in": 256, "\u0120a": 257}
MERGES = [["i", "n"], ["\u0120", "a"]]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False}
# Beyond the vocabulary, as Qwen's are; Llama 2's first tokens are pieces, too.
ADDED = [
    token("<|endoftext|>", 258), token("<|im_start|>", 259), token("<|im_end|>", 260),
    token("<tool_call>", 261, special=False), token("   ", 262, special=False),
]  # fmt: skip
FALLBACK = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
FALLBACK |= {"\u2581": 259, "a": 260, "b": 261, "\u2581a": 262}


def template(text: str, number: int) -> dict[str, Any]:
    """A `post_processor` that writes a token before each text."""
    part = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing", "single": [part, first], "pair": [part, first, part, second],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }  # fmt: skip


def bpe(vocab: dict[str, int], merges: list[Any], **settings: Any) -> dict[str, Any]:
    """A byte-pair `model`."""
    defaults = dict(
        dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
        byte_fallback=False,
    )  # fmt: skip
    return {"type": "BPE", **defaults, **settings, "vocab": vocab, "merges": merges}


def tokenizer_json(**parts: Any) -> dict[str, Any]:
    """A tokenizer.json of Qwen's kind."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": ADDED,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]},
        "post_processor": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": bpe(BYTES, MERGES),
    } | parts  # fmt: skip


LLAMA2 = dict(
    added_tokens=[token("<unk>", 0), token("<s>", 1), token("</s>", 2), token("<|im_end|>", 263)],
    normalizer={
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    },
    pre_tokenizer=None,
    post_processor=template("<s>", 1),
    decoder={
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    model=bpe(
        FALLBACK, ["\u2581 a"], unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False
    ),
)
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "Qwen": {},
    "merges as text": dict(model=bpe(BYTES, [" ".join(pair) for pair in MERGES])),
    "empty affixes": dict(
        model=bpe(BYTES, MERGES, continuing_subword_prefix="", end_of_word_suffix="", ignore_merges=False)
    ),
    "Llama 3": dict(
        normalizer=None,
        model=bpe(BYTES, MERGES, ignore_merges=True),
        post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, template("<|endoftext|>", 258)]},
    ),
    "without a post-processor": dict(post_processor=None),
    "padded and cut": dict(
        padding={
            "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 258,
            "pad_type_id": 0, "pad_token": "<|endoftext|>",
        },
        truncation={"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0},
    ),
    "SmolLM": dict(
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}],
        },
        post_processor=None,
    ),
    "normalizers": dict(
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"}, {"type": "Nmt"},
                {"type": "Strip", "strip_left": True, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
                {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                 "strip_accents": None, "lowercase": True},
            ],
        }
    ),
    "Llama 2": LLAMA2,
    "Mistral": LLAMA2 | dict(normalizer=None, pre_tokenizer=METASPACE),
    "unigram": LLAMA2
    | dict(
        normalizer=None,
        pre_tokenizer=METASPACE,
        model={
            "type": "Unigram", "unk_id": 0, "byte_fallback": True,
            "vocab": [[piece, -float(number)] for piece, number in FALLBACK.items()],
        },
    ),
}  # fmt: skip
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, files: dict[str, Any]) -> Path:
    """Write JSON files and texts."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_json(name, tmp_path):
    spec = tokenizer_json(**TOKENIZERS[name])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    path = write_tokenizer(tmp_path, {"tokenizer.json": spec, "tokenizer_config.json": config})
    # A unigram model has control tokens among its pieces, which is refused for a reason of its own.
    if name == "unigram":
        tokenizer_files.check_files(path)
        return
    tokenizer = load_tokenizer_from(str(path))
    assert "a" in tokenizer.decode(tokenizer.encode("a b"))


def decoder(tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """tokenizer_config.json's `added_tokens_decoder`."""
    return {str(t["id"]): {key: value for key, value in t.items() if key != "id"} for t in tokens}


EOS = {"__type": "AddedToken"} | {
    key: value for key, value in ADDED[2].items() if key not in ("id", "special")
}
LIMIT = 1000000000000000019884624838656
# Case -> tokenizer_config.json, beside its class and its eos.
TOKENIZER_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5": dict(
        tokenizer_class="Qwen2Tokenizer", add_bos_token=False, add_prefix_space=False, bos_token=None,
        added_tokens_decoder=decoder(ADDED), additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False, errors="replace", model_max_length=131072, unk_token=None,
        pad_token="<|endoftext|>", split_special_tokens=False, chat_template=PLAIN,
    ),
    "objects": dict(
        bos_token=EOS, eos_token=EOS, pad_token=None, unk_token=EOS, add_eos_token=False, legacy=False,
        model_max_length=LIMIT, sp_model_kwargs={}, use_default_system_prompt=False, padding_side="right",
        add_prefix_space=None, legacy_behaviour=None, chat_template=PLAIN,
    ),
    "Llama 3": dict(
        model_input_names=["input_ids", "attention_mask"], model_max_length=131072, chat_template=PLAIN,
        bos_token="<|endoftext|>", added_tokens_decoder=decoder(ADDED), truncation_side="left",
    ),
    "named templates": dict(
        chat_template=[{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": PLAIN}]
    ),
    "without a template": dict(chat_template=None, model_max_length=None, extra_special_tokens={}),
    "Gemma 3": dict(
        extra_special_tokens={"boi_token": "<|im_start|>", "eoi_token": "<|im_end|>"}, sp_model_kwargs=None,
        boi_token="<|im_start|>", processor_class="Gemma3Processor", spaces_between_special_tokens=False,
        added_tokens_decoder=decoder(ADDED), model_max_length=float(LIMIT), image_token="<|im_end|>",
    ),
    "transformers 5": dict(
        tokenizer_class="TokenizersBackend", backend="tokenizers", is_local=True, local_files_only=False,
        extra_special_tokens=["<|im_start|>"], model_specific_special_tokens={}, errors="replace",
        auto_map={"AutoTokenizer": [None, "tokenization.Tokenizer"]},
    ),
    "an empty list of added tokens": dict(added_tokens_decoder={}),
    "some of the added tokens": dict(added_tokens_decoder=decoder(ADDED[2:3]), additional_special_tokens=None),
    "new added tokens": dict(added_tokens_decoder=decoder([*ADDED, token("<pad>", 263)]), pad_token="<pad>"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZER_CONFIGS)
def test_tokenizer_config(name, tmp_path):
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    files = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": defaults | TOKENIZER_CONFIGS[name],
        "vocab.json": BYTES,
        "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n",
    }
    tokenizer = load_tokenizer_from(str(write_tokenizer(tmp_path, files)))
    assert tokenizer.eos_ids == (260,) and {258, 259, 260, 261} <= tokenizer.control_ids
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer_from(str(tmp_path / "saved")).control_ids == tokenizer.control_ids


@pytest.mark.parametrize("tokens", [ADDED[2:3], []])
def test_a_class_that_drops_unlisted_tokens_is_refused(tokens, tmp_path):
    """Qwen2Tokenizer of transformers 5 has no other added tokens than those of added_tokens_decoder."""
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    config["added_tokens_decoder"] = decoder(tokens)
    files = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": config}
    with pytest.raises(
        ValueError, match="added_tokens_decoder transformers reads .*all added tokens, or remove"
    ):
        load_tokenizer_from(str(write_tokenizer(tmp_path, files)))


@pytest.mark.parametrize("listed", [{"0": "x"}, {"258": "x"}, {"5": "<|im_end|>"}, {"263": "in"}])
def test_a_list_of_added_tokens_that_contradicts_the_tokenizer_is_refused(listed, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    config["added_tokens_decoder"] = {number: {"content": content} for number, content in listed.items()}
    files = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": config}
    with pytest.raises(ValueError, match="added_tokens_decoder has .*: both must be equal"):
        load_tokenizer_from(str(write_tokenizer(tmp_path, files)))


@pytest.mark.parametrize(
    "special",
    [
        {},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None},
        {"eos_token": EOS, "bos_token": EOS, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        {"eos_token": EOS, "additional_special_tokens": [EOS], "boi_token": "<|im_start|>"},
        {"eos_token": "<|im_end|>", "bos_token": "", "additional_special_tokens": []},
    ],
)
def test_special_tokens_map(special, tmp_path):
    files = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
        "special_tokens_map.json": special,
        "added_tokens.json": {t["content"]: t["id"] for t in ADDED},
        "chat_template.jinja": PLAIN,
        "generation_config.json": {"eos_token_id": [260, 258], "pad_token_id": 258},
        "config.json": write_version_4("qwen2", MODELS["Qwen2.5 0.5B"][1]),
    }
    tokenizer = load_tokenizer_from(str(write_tokenizer(tmp_path, files)))
    assert tokenizer.eos_ids == (260, 258)
    assert tokenizer.chat([("user", "a")], fallback=False)[0] == 259


# --- GGUF --------------------------------------------------------------------------------------------

GGUF_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen2": (
        896,
        dict(block_count=24, context_length=32768, embedding_length=896, feed_forward_length=4864)
        | {"attention.head_count": 14, "attention.head_count_kv": 2, "rope.freq_base": 1000000.0},
    ),
    "qwen3": (
        1024,
        dict(block_count=28, context_length=40960, embedding_length=1024, feed_forward_length=3072)
        | {"attention.head_count": 16, "attention.head_count_kv": 8, "attention.key_length": 128}
        | {"attention.value_length": 128, "rope.freq_base": 1000000.0, "rope.dimension_count": 128},
    ),
    "llama": (
        576,
        dict(block_count=30, context_length=8192, embedding_length=576, feed_forward_length=1536)
        | {"attention.head_count": 9, "attention.head_count_kv": 3, "rope.dimension_count": 64}
        | {"vocab_size": 263, "rope.freq_base": 100000.0, "rope.scaling.type": "none"},
    ),
    "gemma3": (
        1152,
        dict(block_count=26, context_length=32768, embedding_length=1152, feed_forward_length=6912)
        | {"attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 256}
        | {"attention.value_length": 256, "attention.sliding_window": 512, "rope.freq_base": 1000000.0},
    ),
}


@pytest.mark.parametrize("arch", GGUF_MODELS)
def test_gguf_metadata(arch, tmp_path):
    width, sizes_of_arch = GGUF_MODELS[arch]
    pieces = [*BYTES, *[t["content"] for t in ADDED]]
    metadata = {
        "general.architecture": arch, "general.type": "model", "general.name": "A model", "general.file_type": 15,
        "general.tags": ["chat", "text-generation"], "general.quantization_version": 2,
        "quantize.imatrix.entries_count": 168,
        **{f"{arch}.{key}": value for key, value in sizes_of_arch.items()},
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [1] * len(BYTES) + [3, 3, 3, 4, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.eos_token_id": 260, "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.padding_token_id": 258, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.chat_template": PLAIN,
    }  # fmt: skip
    file = tmp_path / "model.gguf"
    packed = {key: pack_value(value) for key, value in metadata.items()}
    file.write_bytes(write_gguf(packed, {"token_embd.weight": (263, width)}))
    header = gguf.read_header(file)
    assert gguf.read_model_config(header, file).width == width
    assert gguf.read_gguf_generation_config(header, file)["eos_token_id"] == 260
    assert gguf_tokenizer.read_tokenizer(file).eos_ids == (260,)


# --- settings ----------------------------------------------------------------------------------------


def test_settings_that_people_use_are_within_the_bounds():
    """What runs of verl, TRL and others are started with."""
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict(
        {
            "seed": 2**31 - 1, "steps": 100_000,
            "data.prompts_per_step": 2048, "data.max_prompt_tokens": 131_072, "data.refill_prompts": 8192,
            "data.synthetic_size": 1_000_000, "data.bucket": 4096,
            "rollout.group_size": 64, "rollout.max_new_tokens": 32_768, "rollout.temperature": 0.6,
            "rollout.top_k": 50, "rollout.top_p": 0.95, "rollout.min_p": 0.05, "rollout.max_rows": 131_072,
            "rollout.memory_gib": 141.0, "rollout.segment": 2048,
            "policy.optimiser.lr": 1e-6, "policy.optimiser.weight_decay": 0.0, "policy.optimiser.warmup_steps": 0,
            "policy.optimiser.b2": 0.95, "policy.optimiser.eps": 1e-15, "policy.optimiser.clip_norm": 0.1,
            "policy.kl_coef": 0.0, "policy.clip_low": 0.2, "policy.clip_high": 0.28, "policy.dual_clip": 10.0,
            "policy.entropy_coef": 0.0, "policy.minibatches": 64, "policy.epochs": 16, "policy.microbatch": 4096,
            "policy.lora.rank": 256, "policy.lora.alpha": 512.0, "policy.vocab_multiple": 128,
            "reward.microbatch": 4096, "reward.max_tokens": 131_072, "reward.optimiser.lr": 1e-5,
            "reward.updates": 100, "reward.function_timeout": 3600.0, "reward.overlong_tokens": 4096,
            "rule.workers": 256, "rule.timeout": 3600.0, "rule.memory_mb": 16_384, "rule.step_budget": 600.0,
            "assistant.concurrency": 2048, "assistant.timeout": 3600.0, "assistant.retries": 10,
            "judge.concurrency": 2048, "judge.max_new_tokens": 32_768, "judge.temperature": 0.0,
            "annotate.problems": 1_000_000, "annotate.samples": 64, "annotate.batch": 8192,
            "train_rm.epochs": 10, "train_rm.batch": 1024, "train_rm.eval_share": 0.001,
            "eval.every": 1000, "eval.samples": 256, "benchmark.samples": 1024, "benchmark.max_new_tokens": 65_536,
            "serve.port": 8000, "serve.slots": 1024, "serve.timeout": 86_400.0, "serve.max_waiting": 100_000,
            "checkpoint.every": 1000, "checkpoint.keep": 0, "mesh.data": -1, "mesh.fsdp": 256, "mesh.tensor": 8,
            "supervised.policy_steps": 100_000, "supervised.policy_batch": 4096, "log.samples": 1024,
        }
    )  # fmt: skip
    bounds.check_bounds(cfg)


def test_a_file_is_read_with_long_texts_and_many_tokens(tmp_path):
    """Gemma's tokenizers have 262,144 tokens and 6,000 added ones; some templates have 20,000 characters."""
    many = [token(f"<unused{i}>", 263 + i) for i in range(6000)]
    vocab = BYTES | {t["content"]: t["id"] for t in [*ADDED, *many]}
    vocab |= {f"piece {i}": 6263 + i for i in range(20_000)}
    files = {
        "tokenizer.json": tokenizer_json(model=bpe(vocab, MERGES), added_tokens=[*ADDED, *many]),
        "tokenizer_config.json": {
            "eos_token": "<|im_end|>", "chat_template": PLAIN + "{# x #}" * 10_000,
            "added_tokens_decoder": decoder([*ADDED, *many]),
        },
    }  # fmt: skip
    path = write_tokenizer(tmp_path, files)
    tokenizer_files.check_files(path)
    assert len(read_json(path / "tokenizer.json")["added_tokens"]) == 6005
