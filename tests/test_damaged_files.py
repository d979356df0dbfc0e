"""Damaged model files: each is refused in one line that names file and field, or loads as the whole one.

The tables of bad values are in damaged_files.py.  `python tests/test_damaged_files.py` prints how many cases of
each file were refused, and how many changed nothing.
"""

from __future__ import annotations

import collections
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import damaged_files
import pytest
import tiny_tokenizers

from cooper_jax.model import tokenizer, weight_export, weight_files, weights

LONGEST = 1000  # characters of a message
Count = collections.Counter[str]

# (field, bad value) -> another model that the value stands for: it is no damage.
LEGAL = {
    ("rope_theta", "billion"),
    ("rope_theta", "float billion"),
    ("low_freq_factor", "half"),
    ("query_pre_attn_scalar", "half"),
    ("max_window_layers", "zero"),  # all layers slide
    ("no_rope_layers", "zero"),  # the first layer does not rotate
    ("num_key_value_heads", "null"),  # as many as query heads
    ("sliding_window", "null"),  # none
    ("pad_token", "null"),  # special_tokens_map.json's, or the first end token
    ("pad_token", "empty text"),
    ("bos_token", "empty text"),
    ("end_of_word_suffix", "empty text"),
    ("chat_template", "empty text"),  # none
    ("add_prefix_space", "true"),
    ("merges", "empty list"),
    ("eos_token_id", "zero"),  # of the tokenizer's ids
    ("eos_token_id", "list"),
}


# Fields of tokenizer.json that are rules: another text in one is another rule, which nobody can tell from damage.
RULES = {"normalizer", "pre_tokenizer", "decoder", "single"}


def try_cases(
    load: Callable[[], Any],
    file: Path,
    cases: Iterable[tuple[tuple[Any, ...], str, bytes]],
    without: Callable[[tuple[Any, ...]], bytes] | None = None,
) -> Count:
    """Load each damaged copy of a file, which is as it was afterwards.

    Args:
      cases: (path of the field, name of the damage, the file's contents).
      without: the file's contents without a field.  null stands for that.
    """
    whole, good = load(), file.read_bytes()
    count: Count = collections.Counter()
    for path, name, content in cases:
        file.write_bytes(content)
        fields = [part for part in path if isinstance(part, str)]
        what = f"{file.name}, {path}, {name}"
        try:
            loaded = load()
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and "\x1b" not in message and len(message) < LONGEST, (
                f"{what}: {message}"
            )
            assert str(file.parent) in message, f"{what}: {message}"
            # A file that is damaged as a whole has no field.
            # tokenizer.json's parts refer to each other: the reference may be what is named.
            named = not fields or any(field in message for field in (fields[0], fields[-1], "post_processor"))
            assert named, f"{what}: {message}"
            count["refused"] += 1
            continue
        if loaded == whole:
            count["harmless"] += 1
            continue
        if name == "null" and without is not None:
            file.write_bytes(without(path))
            try:
                if load() == loaded:
                    count["harmless"] += 1
                    continue
            except ValueError:
                pass
        legal = any((field, name) in LEGAL for field in fields) or not RULES.isdisjoint(fields)
        assert legal, f"{what} loads as another model"
        count["legal"] += 1
    file.write_bytes(good)
    assert load() == whole
    return count


def try_json(load: Callable[[], Any], file: Path, paths: list[tuple[Any, ...]] | None = None) -> Count:
    """Damage a JSON file in each field and as a whole.  paths: of the fields; None: all."""
    tree = json.loads(file.read_bytes())
    cases = damaged_files.mutate_fields(tree, paths)
    count = try_cases(load, file, cases, lambda path: damaged_files.remove(tree, path))
    whole = [((), name, content) for name, content in damaged_files.damage_whole(tree)]
    damaged = try_cases(load, file, whole)
    assert damaged == {"refused": len(whole)}, damaged
    return count + damaged


# --- config.json -------------------------------------------------------------------------------------

# What published files have, with sizes of a small model; some fields are read by nothing here.
COMMON = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16", initializer_range=0.02, use_cache=True,
    attention_dropout=0.0, transformers_version="4.40.0",
)  # fmt: skip
ACTIVATION = dict(hidden_act="silu")
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=512,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON
    | ACTIVATION
    | dict(
        architectures=["LlamaForCausalLM"],
        rope_theta=5e5,
        rope_scaling=LLAMA3,
        attention_bias=False,
        mlp_bias=False,
    ),
    "qwen2": COMMON
    | ACTIVATION
    | dict(
        architectures=["Qwen2ForCausalLM"],
        rope_theta=1e6,
        use_sliding_window=True,
        sliding_window=32,
        max_window_layers=2,
    ),
    "mistral": COMMON
    | ACTIVATION
    | dict(architectures=["MistralForCausalLM"], rope_theta=1e4, sliding_window=32),
    "smollm3": COMMON
    | ACTIVATION
    | dict(
        architectures=["SmolLM3ForCausalLM"],
        rope_theta=1e4,
        no_rope_layers=[1, 1, 1, 0],
        no_rope_layer_interval=4,
        layer_types=["full_attention"] * 4,
    ),
    "gemma3_text": COMMON
    | dict(
        architectures=["Gemma3ForCausalLM"],
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


def damage_config(family: str, folder: Path) -> Count:
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": family} | CONFIGS[family]))
    return try_json(lambda: weights.read_config(str(folder)), file)


def test_a_damaged_config_is_refused_or_the_same_model(tmp_path):
    count = damage_config("llama", tmp_path)
    assert count["refused"] > 350 and count["harmless"] > 150


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_damaged_configs_of_all_families(family, tmp_path):
    assert damage_config(family, tmp_path)["refused"] > 300


# --- weights -----------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A directory of a tiny model in several files, with their index."""
    from tiny_models import config, random_params

    c = config(layers=1, width=16, head_dim=4, ffn=16)
    weight_export.save_pretrained(tmp_path / "m", c, random_params(c), "logits", max_shard_bytes=3000)
    return tmp_path / "m"


def damage_index(folder: Path) -> Count:
    def load():
        tensors = weight_files.open_safetensors(folder)
        return tensors.shapes, {name: tensors.where(name) for name in tensors.shapes}

    return try_json(load, folder / "model.safetensors.index.json")


def test_a_damaged_index_is_refused_or_unused(sharded):
    count = damage_index(sharded)
    assert count["refused"] > 100 and not count["legal"]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_an_index_names_no_file_elsewhere(sharded, name):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="index.json: weight_map.*it must be the name of a .safetensors file"
    ):
        weight_files.open_safetensors(sharded)


def test_the_fields_of_a_head_are_checked_with_the_weights(sharded):
    """architectures, id2label and num_labels are read with the weights, not with the shape."""
    from tiny_models import one_device

    file = sharded / "config.json"
    tree = json.loads(file.read_text()) | {"num_labels": 2, "id2label": {"0": "A", "1": "B"}}
    file.write_text(json.dumps(tree))
    fields = [("architectures",), ("architectures", 0), ("num_labels",), ("id2label",)]
    count = try_cases(
        lambda: weights.load_weights(str(sharded), layout=one_device()).config,
        file,
        damaged_files.mutate_fields(tree, fields),
        lambda path: damaged_files.remove(tree, path),
    )
    assert count["refused"] > 70 and not count["legal"]


# --- tokenizers --------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, family: str) -> list[Path]:
    """Write a tokenizer's directory with all files that published ones have; returns the JSON files."""
    tiny_tokenizers.write(folder, family)
    spec = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: token for token in spec["added_tokens"]}
    decoder = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]
    }
    config |= dict(
        add_bos_token=False, add_prefix_space=False, clean_up_tokenization_spaces=False, errors="replace",
        model_max_length=4096, split_special_tokens=False, unk_token=None, added_tokens_decoder=decoder,
        additional_special_tokens=list(added)[:2],
    )  # fmt: skip
    eos = added[config["eos_token"]]
    contents = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": {
            "eos_token": {k: v for k, v in eos.items() if k not in ("id", "special")},
            "pad_token": config.get("pad_token", config["eos_token"]),
        },
        "generation_config.json": dict(
            bos_token_id=eos["id"], eos_token_id=[eos["id"], eos["id"] - 1], pad_token_id=eos["id"],
            temperature=0.6, top_p=0.9, do_sample=True, transformers_version="4.40.0",
        ),
        "config.json": dict(
            model_type={"qwen": "qwen2"}.get(family, "llama"), vocab_size=600, eos_token_id=eos["id"],
            bos_token_id=0,
        ),
    }  # fmt: skip
    for name, tree in contents.items():
        (folder / name).write_text(json.dumps(tree))
    return [*(folder / name for name in contents), folder / "tokenizer.json"]


def describe_tokenizer(folder: Path) -> tuple[Any, ...]:
    """What a tokenizer makes of some texts."""
    tok = tokenizer.load_tokenizer_from(str(folder))
    text = "Tom has  45 apples\n"
    return (
        tok.vocab_size,
        tok.pad_id,
        tok.bos_id,
        tok.eos_ids,
        tok.control_ids,
        tok.encode(text),
        tok.offsets(text),
        tok.decode(tok.encode(text)),
        tok.chat([("user", "What is 3 plus 7? <|im_end|>")], fallback=True),
    )


def damage_tokenizer(file: Path) -> Count:
    tree = json.loads(file.read_text())
    paths = damaged_files.list_paths(tree)
    # One piece of the vocabulary and one of the listed tokens stand for all.
    paths = [path for path in paths if path[:2] != ("model", "vocab") or len(path) == 2 or path[2] == "a"]
    listed = list(tree.get("added_tokens_decoder", []))[1:]
    paths = [path for path in paths if path[0] != "added_tokens_decoder" or not {*path[1:2]} & {*listed}]
    return try_json(lambda: describe_tokenizer(file.parent), file, paths)


def test_damaged_ids_of_special_tokens_are_refused(tmp_path):
    files = {file.name: file for file in write_tokenizer(tmp_path, "qwen")}
    count = damage_tokenizer(files["generation_config.json"])
    assert count["refused"] > 70 and count["harmless"] > 60


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "llama3", "llama2"])
def test_damaged_tokenizers(family, tmp_path):
    for file in write_tokenizer(tmp_path, family):
        assert damage_tokenizer(file)["refused"] > 30, file.name


BAD_TOKENIZERS = {
    "eos_token": ("tokenizer_config.json", "eos_token", "<|nowhere|>", "eos_token is '<|nowhere|>'"),
    "template": (
        "tokenizer_config.json",
        "chat_template",
        "x",
        "chat_template .*leaves out what messages say",
    ),
    "decoder": (
        "tokenizer_config.json",
        "added_tokens_decoder",
        {"0": {"content": "x"}},
        "both must be equal",
    ),
    "id": ("generation_config.json", "eos_token_id", 10**6, "eos_token_id is 1000000 .*id of one of"),
    "rules": (
        "tokenizer.json",
        "pre_tokenizer",
        {"type": "x"},
        "tokenizer.json: pre_tokenizer: transformers",
    ),
    "model": (
        "tokenizer.json",
        "model",
        {"type": "x", "vocab": {"a": 0}},
        "tokenizer.json: model: transformers",
    ),
    "vocab": ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": 0, "b": 0}}, "ids must differ"),
    "dtype": ("config.json", "eos_token_id", "x", "config.json: eos_token_id is 'x'"),
    "other": (
        "config.json",
        "hidden_size",
        "x",
        "config.json: hidden_size is 'x': it must be a whole number",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_files_of_a_tokenizer_that_do_not_fit_are_named(case, tmp_path):
    name, field, value, message = BAD_TOKENIZERS[case]
    write_tokenizer(tmp_path, "qwen")
    tree = json.loads((tmp_path / name).read_text()) | {field: value}
    (tmp_path / name).write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.load_tokenizer_from(str(tmp_path))
    assert "\n" not in str(error.value)


def test_padding_to_a_fixed_length_takes_no_memory(tmp_path):
    """tokenizer.json may say to which length every text is padded: that is for other programs."""
    write_tokenizer(tmp_path, "qwen")
    whole = describe_tokenizer(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["padding"] = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "a",
    }  # fmt: skip
    tree["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert describe_tokenizer(tmp_path) == whole


# --- GGUF --------------------------------------------------------------------------------------------

GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "general.name": "a name",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 8,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 4.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.padding_token_id": 3,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}<s>{% endfor %}",
}
GGUF_SHAPES = {"token_embd.weight": (61, 32)}
# Values that stand for another model.
GGUF_LEGAL = {
    ("llama.rope.freq_base", "billion"),
    ("llama.rope.freq_base", "float billion"),
    ("tokenizer.ggml.add_bos_token", "false"),
    ("tokenizer.ggml.merges", "empty list"),
    ("tokenizer.ggml.bos_token_id", "zero"),
    ("tokenizer.ggml.eos_token_id", "zero"),
    ("tokenizer.ggml.padding_token_id", "zero"),
    ("tokenizer.chat_template", "empty text"),
}


def test_damaged_metadata_of_gguf_are_refused_or_unused(tmp_path):
    file = tmp_path / "m.gguf"
    packed = {key: damaged_files.pack_value(value) for key, value in GGUF.items()}

    def load():
        tok = tokenizer.load_tokenizer_from(str(file))
        ids = tok.pad_id, tok.bos_id, tok.eos_ids, tok.encode("abab a"), tok.chat([("user", "ab")], True)
        return weights.read_config(str(file)), ids

    file.write_bytes(damaged_files.write_gguf(packed, GGUF_SHAPES))
    whole = load()
    count: Count = collections.Counter()
    for key in GGUF:
        for name, bad in damaged_files.BAD_PACKED.items():
            file.write_bytes(damaged_files.write_gguf(packed | {key: bad}, GGUF_SHAPES))
            try:
                loaded = load()
            except ValueError as error:
                message = str(error)
                assert "\n" not in message and len(message) < LONGEST, (key, name, message)
                named = key.removeprefix("tokenizer.ggml.").removeprefix("tokenizer.") in message
                # An ordinary piece as bos: all special tokens are suspected.
                named |= key.endswith("_token_id") and "in data as a control token" in message
                assert str(file) in message and named, (key, name, message)
                count["refused"] += 1
                continue
            same = loaded == whole
            assert same or (key, name) in GGUF_LEGAL, (key, name)
            count["harmless" if same else "legal"] += 1
    assert count["refused"] > 450 and count["harmless"] > 10, count


def test_a_gguf_file_with_a_key_twice_is_refused(tmp_path):
    packed = {key: damaged_files.pack_value(value) for key, value in GGUF.items()}
    blob = damaged_files.write_gguf(packed | {"llama.block_xxxxx": damaged_files.pack_value(3)}, GGUF_SHAPES)
    (tmp_path / "m.gguf").write_bytes(blob.replace(b"llama.block_xxxxx", b"llama.block_count"))
    with pytest.raises(ValueError, match="m.gguf: its metadata have 'llama.block_count' twice"):
        weights.read_config(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("shape", [(0, 32), (2**40, 32), (61,), (61, 32, 1)])
def test_a_gguf_file_with_an_absurd_embedding_is_refused(shape, tmp_path):
    packed = {key: damaged_files.pack_value(value) for key, value in GGUF.items()}
    (tmp_path / "m.gguf").write_bytes(damaged_files.write_gguf(packed, {"token_embd.weight": shape}))
    with pytest.raises(ValueError, match="m.gguf: the tensor token_embd.weight has the shape"):
        weights.read_config(str(tmp_path / "m.gguf"))


def main() -> None:
    """Run the long form, and print the number of cases of each file."""
    total: Count = collections.Counter()
    for family in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            count = damage_config(family, Path(folder))
            total += count
            print(f"{family}: config.json: {dict(count)}", flush=True)
    for family in ("qwen", "llama3", "llama2"):
        with tempfile.TemporaryDirectory() as folder:
            for file in write_tokenizer(Path(folder), family):
                count = damage_tokenizer(file)
                total += count
                print(f"{family}: {file.name}: {dict(count)}", flush=True)
    print(f"in all: {sum(total.values())} cases: {dict(total)}")


if __name__ == "__main__":
    main()
