"""Adapters: their gradients, what an update changes, and that merged, exported and resumed models are the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
from tiny_models import one_device, random_params
from tiny_steps import begun, build_components, config, host, solved, take_step
from tiny_updates import layout_of

from cooper_jax.configs import base
from cooper_jax.model import adapter_export, transformer, weight_export, weights
from cooper_jax.model.lora import TARGETS, LoraConfig, merge_adapters
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward import reward_losses, verifier_model
from cooper_jax.rollout import engine, sampling_spec
from cooper_jax.runtime import mesh, optim
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import run_checkpoint
from cooper_jax.trainer.resume import save_checkpoint
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.state import checkpoint_items
from cooper_jax.types import PolicyBatch, ScoreBatch

LORA = LoraConfig(rank=3, alpha=6.0, targets=TARGETS, rslora=False, base_dtype="float32")
N, P, T = 6, 4, 5


def with_lora(shape="qwen2_tied", **changes):
    cases = tiny_models.CASES | tiny_models.FAMILY_CASES
    return dataclasses.replace(cases[shape], lora=dataclasses.replace(LORA, **changes))


def make_batch(vocab_size: int) -> PolicyBatch:
    rng = np.random.default_rng(0)
    valid = np.ones((N, P + T), bool)
    valid[1, :2] = valid[2, -2:] = False
    noise = rng.normal(0, 0.1, (3, N, T)).astype(np.float32) - 4
    return PolicyBatch(
        tokens=jnp.asarray(rng.integers(vocab_size, size=(N, P + T)), jnp.int32),
        valid=jnp.asarray(valid),
        response_mask=jnp.asarray(valid[:, P:]),
        advantages=jnp.asarray(rng.standard_normal(N), jnp.float32),
        old_logprobs=jnp.asarray(noise[0]),
        ref_logprobs=jnp.asarray(noise[1]),
        rollout_logprobs=jnp.asarray(noise[2]),
    )


def policy_gradients(model, params, layout=None):
    cfg = base.get_config().policy
    cfg.microbatch, cfg.kl_coef = 4, 0.1
    compute = grpo.make_gradients(
        model, PolicyConfig.from_config(cfg), layout or one_device(), temperature=1.0, max_new_tokens=T
    )
    return jax.jit(compute)(params, make_batch(model.vocab_size))[1]


def as_matrices(adapter):
    """A [L, in, rank] and B [L, rank, out]."""
    a, b = (np.asarray(adapter[side], np.float64) for side in ("a", "b"))
    return a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), b.shape[1], -1)


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rslora"),
    [
        ("qwen2_tied", False),
        ("llama_untied_one_kv_head", True),
        pytest.param("gemma3", True, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_adapters_follow_from_that_of_the_merged_matrix(shape, rslora):
    """dL/dA = s G B^T and dL/dB = s A^T G, with G the gradient of W + s A B."""
    model = with_lora(shape, rslora=rslora)
    params = random_params(model)
    scale = 6.0 / (3**0.5 if rslora else 3)
    adapters = policy_gradients(model, params)
    assert set(adapters) == {"lora"}, "the base has no gradient"
    full = policy_gradients(model.base, merge_adapters(params, model.lora))["layers"]
    for name, found in adapters["lora"].items():
        a, b = as_matrices(params["lora"][name])
        matrix = np.asarray(full[name], np.float64).reshape(len(a), a.shape[1], b.shape[2])
        d_a, d_b = as_matrices(found)
        expected_a = scale * np.einsum("lio,lro->lir", matrix, b)
        expected_b = scale * np.einsum("lir,lio->lro", a, matrix)
        assert np.abs(expected_a).max() > 1e-3 and np.abs(expected_b).max() > 1e-3
        np.testing.assert_allclose(d_a, expected_a, atol=1e-5)
        np.testing.assert_allclose(d_b, expected_b, atol=1e-5)


def test_with_a_full_basis_the_first_update_is_that_of_all_weights():
    """A = I, B = 0, s = 1: after a step of SGD, W + A B is W - lr G."""
    model = with_lora(rank=32, alpha=32.0, targets=("q_proj", "up_proj"))
    assert model.width == 32 and model.lora.scale == 1.0
    params = random_params(model)
    for name in ("q", "up"):
        adapter = params["lora"][name]
        params["lora"][name] = {
            "a": jnp.broadcast_to(jnp.eye(32)[None], adapter["a"].shape),
            "b": jnp.zeros_like(adapter["b"]),
        }
    adapters = policy_gradients(model, params)["lora"]
    full = policy_gradients(model.base, {k: v for k, v in params.items() if k != "lora"})["layers"]
    for name in ("q", "up"):
        assert not np.any(adapters[name]["a"])
        np.testing.assert_allclose(adapters[name]["b"], full[name], atol=1e-6)
        stepped = jax.tree.map(lambda x, g: x - 0.1 * g, params["lora"][name], adapters[name])
        merged = merge_adapters(params | {"lora": {name: stepped}}, model.lora)["layers"][name]
        np.testing.assert_allclose(merged, params["layers"][name] - 0.1 * full[name], atol=1e-6)


@pytest.mark.slow
def test_a_base_in_bfloat16_computes_what_its_values_in_float32_compute():
    model = with_lora(base_dtype="bfloat16")
    specs = transformer.param_specs(model)
    params = jax.tree.map(lambda x, spec: x.astype(spec.dtype), random_params(model), specs)
    assert params["embed"].dtype == params["layers"]["q"].dtype == jnp.bfloat16
    assert params["layers"]["attn_norm"].dtype == params["lora"]["q"]["a"].dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    for found, expected in zip(
        jax.tree.leaves(policy_gradients(model, params)),
        jax.tree.leaves(policy_gradients(with_lora(), wide)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    merged = merge_adapters(params, model.lora)["layers"]
    np.testing.assert_array_equal(merged["q"], merge_adapters(wide, model.lora)["layers"]["q"])

    # The base has no moments, and an update leaves its bits as they are.
    opt = optim.make_optimiser(
        optim.OptimiserConfig.from_config(base.optimiser(lr=0.1, warmup_steps=0), "policy.optimiser")
    )
    state = optim.init_state(params, opt)
    grads = policy_gradients(model, params)
    updated, _ = jax.jit(lambda s: optim.apply_update(s, grads, jnp.zeros(()), opt))(state)
    assert updated.params["embed"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updated.params["layers"]["q"], params["layers"]["q"])
    assert (updated.params["lora"]["q"]["b"] != params["lora"]["q"]["b"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 2)])
def test_gradients_on_meshes(sizes):
    model = dataclasses.replace(with_lora(), vocab_multiple=8)
    params, layout = random_params(model), layout_of(*sizes, jax.devices()[:4])
    placed = jax.device_put(params, mesh.make_shardings(layout, transformer.param_specs(model)))
    one, several = policy_gradients(model, params), policy_gradients(model, placed, layout)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    spread = placed["lora"]["gate"]["a"].sharding
    assert spread.shard_shape(params["lora"]["gate"]["a"].shape)[1] == 32 // sizes[1]


# --- updates -----------------------------------------------------------------------------------------


def make_optimiser(section):
    return optim.make_optimiser(optim.OptimiserConfig.from_config(section.optimiser, "optimiser"))


def test_an_update_trains_adapters_and_score_head_alone():
    model = with_lora()
    params = random_params(model, "score")
    section = base.get_config().reward
    opt = make_optimiser(section)
    cfg = reward_losses.RewardUpdateConfig.from_config(section)
    state = optim.init_state(params, opt)
    moments = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
    trained = sum(x.size for x in jax.tree.leaves((params["lora"], params["score"])))
    assert sum(moments) == 2 * trained < 2 * sum(x.size for x in jax.tree.leaves(params))

    batch = make_batch(model.vocab_size)
    update = verifier_model.make_bce_update(model, cfg, opt, one_device())
    labels, ones = jnp.asarray(np.arange(N) % 2, jnp.float32), jnp.ones(N)
    state, metrics = update(state, ScoreBatch(batch.tokens, batch.valid), labels, ones)
    assert metrics["grad_norm"] > 0 and int(state.updates) == 1
    for path, (old, new) in zip(
        (jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)),
        zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True),
        strict=True,
    ):
        assert np.array_equal(old, new) != ("lora" in path or "score" in path), path


@pytest.mark.slow
def test_microbatches_of_several_shapes_sum_the_gradients_of_adapters():
    model = with_lora()
    params, section = random_params(model, "score"), base.get_config().reward
    section.optimiser.clip_norm = 1e9
    opt = make_optimiser(section)
    cfg = reward_losses.RewardUpdateConfig.from_config(section)
    batch = make_batch(model.vocab_size)
    rows, labels = ScoreBatch(batch.tokens, batch.valid), jnp.asarray(np.arange(N) % 2, jnp.float32)
    whole, _ = verifier_model.make_bce_update(model, cfg, opt, one_device())(
        optim.init_state(params, opt), rows, labels, jnp.ones(N)
    )
    accumulator = verifier_model.make_bce_accumulator(model, cfg, opt, one_device())
    state = optim.init_state(params, opt)
    sums = accumulator.start(state.params)
    for part in (slice(0, 2), slice(2, N)):
        part_rows = ScoreBatch(rows.tokens[part], rows.valid[part])
        count = part.stop - part.start
        sums = accumulator.add(state.params, sums, (part_rows, labels[part], jnp.full(count, 1 / N)))
    assert set(sums.grads) == {"lora", "score"}
    state, _ = accumulator.finish(state, sums)
    for a, b in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(state.opt_state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# --- the merged model ---------------------------------------------------------------------------------


def last_logits(model, params):
    batch = make_batch(model.vocab_size)
    hidden = transformer.hidden_states(
        params, model, batch.tokens, batch.valid, dtype=jnp.float32, layout=one_device()
    )
    return transformer.compute_logits(params, model, hidden), batch


def test_a_new_model_is_its_base():
    model = with_lora()
    specs = transformer.param_specs(model)
    params = mesh.init_params(jax.random.key(0), specs, one_device())
    drawn = np.asarray(params["lora"]["down"]["a"])
    assert drawn.std() == pytest.approx((3 * model.ffn) ** -0.5, rel=0.1)
    assert not np.any(params["lora"]["down"]["b"])
    without = mesh.init_params(jax.random.key(0), transformer.param_specs(model.base), one_device())
    np.testing.assert_array_equal(last_logits(model, params)[0], last_logits(model.base, without)[0])


@pytest.mark.slow
def test_rollouts_sample_from_the_merged_model():
    model, spec = (
        with_lora(),
        sampling_spec.SamplingSpec(
            temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=6, group_size=1, eos_ids=(3,), segment=3,
            dtype="float32",
        ),
    )  # fmt: skip
    params = random_params(model)
    merged = merge_adapters(params, model.lora)
    prompts, key = [[5, 6, 7], [9, 10]], jax.random.key(0)
    expected = engine.generate(merged, model.base, one_device(), prompts, [0, 1], key, spec)
    base_alone = engine.generate(
        {k: v for k, v in params.items() if k != "lora"}, model.base, one_device(), prompts, [0, 1], key, spec
    )
    assert not np.array_equal(base_alone.tokens, expected.tokens)
    layout = layout_of(1, 2, 2, jax.devices()[:4])
    spread = jax.device_put(params, mesh.make_shardings(layout, transformer.param_specs(model)))
    for given, places in ((params, one_device()), (spread, layout)):
        found = engine.generate(given, model, places, prompts, [0, 1], key, spec)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    copied = engine.copy_rollout_weights(params, model, one_device(), "float32")
    again = engine.generate(copied, model, one_device(), prompts, [0, 1], key, spec)
    np.testing.assert_array_equal(again.tokens, expected.tokens)


@pytest.mark.parametrize("head", ["logits", "score"])
def test_an_export_has_the_adapters_in_its_matrices(head, tmp_path):
    model = with_lora("llama_untied_one_kv_head", rslora=True)
    params = random_params(model, head)
    weight_export.save_pretrained(tmp_path, model, params, head, pad_token_id=0)
    loaded = weights.load_weights(str(tmp_path), head=head, layout=one_device())
    outputs = []
    for shape, values in ((model, params), (loaded.config, loaded.params)):
        if head == "logits":
            outputs.append(last_logits(shape, values)[0])
            continue
        batch = make_batch(model.vocab_size)
        hidden = transformer.hidden_states(
            values, shape, batch.tokens, batch.valid, dtype=jnp.float32, layout=one_device()
        )
        outputs.append(transformer.score_last_token(values, shape, hidden, batch.valid))
    np.testing.assert_allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("head", ["logits", "score"])
def test_a_base_is_loaded_in_bfloat16(head, tmp_path):
    model = with_lora("qwen2_tied").base
    weight_export.save_pretrained(tmp_path, model, random_params(model, head), head, pad_token_id=0)
    wide, narrow = (
        weights.load_weights(str(tmp_path), head=head, layout=one_device(), base_dtype=dtype).params
        for dtype in ("float32", "bfloat16")
    )
    declared = transformer.set_base_dtype(transformer.param_specs(model, head), "bfloat16")
    for path, spec in jax.tree.leaves_with_path(declared, is_leaf=mesh.is_spec):
        found, expected = (dict(jax.tree.leaves_with_path(tree))[path] for tree in (narrow, wide))
        assert found.dtype == jnp.dtype(spec.dtype)
        np.testing.assert_array_equal(found, expected.astype(spec.dtype))
    assert narrow["layers"]["q"].dtype == jnp.bfloat16 and narrow["final_norm"].dtype == jnp.float32


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("shape", ["qwen2_tied", "gemma3"])
@pytest.mark.parametrize("head", ["logits", "score"])
def test_peft_loads_the_adapters(shape, head, tmp_path):
    torch = pytest.importorskip("torch", reason="peft needs torch")
    peft = pytest.importorskip("peft", reason="peft is absent")
    import transformers

    model = with_lora(shape, rslora=shape == "gemma3")
    params = random_params(model, head)
    base_params = {name: x for name, x in params.items() if name != "lora"}
    weight_export.save_pretrained(tmp_path / "base", model.base, base_params, head, pad_token_id=0)
    adapter_export.save_adapters(tmp_path / "adapter", model, params, head, str(tmp_path / "base"))

    kind = "AutoModelForCausalLM" if head == "logits" else "AutoModelForSequenceClassification"
    options = {} if head == "logits" else {"num_labels": 1}
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "base", **options)
    if head == "score":  # the adapter directory brings the head
        torch.nn.init.zeros_(loaded.score.weight)
    with_adapters = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()

    rng = np.random.default_rng(1)
    tokens = rng.integers(2, model.vocab_size, size=(3, 7)).astype(np.int32)
    valid = np.ones_like(tokens, bool)
    hidden = transformer.hidden_states(
        params, model, jnp.asarray(tokens), jnp.asarray(valid), dtype=jnp.float32, layout=one_device()
    )
    with torch.no_grad():
        theirs = with_adapters(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    if head == "logits":
        ours = transformer.compute_logits(params, model, hidden)
    else:
        ours = transformer.score_last_token(params, model, hidden, jnp.asarray(valid))[:, None]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs).max() > 0.1


# --- runs --------------------------------------------------------------------------------------------


@pytest.fixture
def hf_base(tmp_path):
    """A directory with a tiny base model for the policy."""
    tokenizer = tiny_tokenizers.write(tmp_path / "tokenizer", "qwen")
    model = tiny_models.config(family="qwen2", vocab_size=608, width=16, layers=1, head_dim=8, max_len=512)
    params = random_params(model)
    weight_export.save_pretrained(
        tmp_path / "hf", model, params, "logits", tokenizer_dir=tokenizer, pad_token_id=0
    )
    return tmp_path / "hf"


def lora_run(folder, **changes):
    return config(
        **{
            "policy.weights": str(folder),
            "policy.lora.rank": 2,
            "policy.lora.base_dtype": "bfloat16",
            "reward.lora.rank": 2,
            "policy.kl_coef": 0.1,
            "policy.optimiser.lr": 1e-2,
            "data.max_prompt_tokens": 300,
        }
        | changes
    )


@pytest.mark.slow
def test_a_run_trains_adapters_beside_the_reference_and_resumes(hf_base, tmp_path, monkeypatch):
    everything = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: everything[:1])
    run = tmp_path / "run"
    run.mkdir()
    cfg = lora_run(hf_base)
    with build_components(cfg, run) as (components, state), begun(components, state, run) as begin:
        state, directory, checkpoints = begin
        assert state.reference is None and not (run / "reference").exists()
        components = solved(components)
        frozen = host({k: v for k, v in state.policy.params.items() if k != "lora"})
        state, metrics, _ = take_step(components, state)
        assert metrics["policy/kl"] == pytest.approx(0.0, abs=1e-6), "the policy starts as the reference"
        state, metrics, _ = take_step(components, state)
        assert metrics["policy/kl"] > 1e-6, "the reference is still the base"
        after = host({k: v for k, v in state.policy.params.items() if k != "lora"})
        assert [x.tobytes() for x in frozen] == [x.tobytes() for x in after]

        # A checkpoint has what was trained alone.
        items = checkpoint_items(state)
        assert set(items["policy"]) == {"lora"} and set(items["reward"]) == {"lora", "score"}
        directory.log(state.step, metrics)
        save_checkpoint(components, state, directory, checkpoints)
        checkpoints.wait()
        trained = host((state.policy, state.reward))
        policy = host(state.policy.params)

    with build_components(cfg, run) as (components, state), begun(components, state, run) as (again, _, _):
        assert again.step == 2 and again.reference is None
        assert [x.tobytes() for x in host((again.policy, again.reward))] == [x.tobytes() for x in trained]

    # A model of the run is loaded with its base.
    model, params, step = run_checkpoint.load_run_model(run, cfg, "policy", components.layout)
    assert step == 2 and model.config.lora.rank == 2
    assert [x.tobytes() for x in host(params)] == [x.tobytes() for x in policy]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy.lora.rank": 2, "supervised.policy_steps": 5},
            "supervised.policy_steps=5: adapters are trained",
        ),
        (
            {"reward.lora.rank": 2, "supervised.start_from": "x"},
            "supervised.start_from=x: adapters are trained",
        ),
        ({"policy.lora.rank": 2, "mesh.reference": "1x1x1"}, "mesh.reference='1x1x1': with policy.lora"),
        ({"policy.lora.rank": 2, "policy.lora.base_dtype": "int8"}, "policy.lora.base_dtype='int8'"),
        ({"policy.lora.rank": -1}, "policy.lora.rank=-1: it must be at least 0"),
        ({"policy.lora.rank": 2, "policy.lora.alpha": 0.0}, "policy.lora.alpha=0.0: it must be above 0"),
        (
            {"reward.lora.rank": 2, "reward.lora.targets": "q_proj,q"},
            "reward.lora.targets='q': it is one of q_proj",
        ),
        ({"policy.lora.rank": 2, "policy.lora.targets": " "}, "policy.lora.targets is empty"),
        ({"policy.lora.rank": 2, "policy.lora.targets": "q_proj,q_proj"}, "a name occurs twice"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(SetupError, match=message):
        RunSettings.from_config(config(**changes))


def test_adapters_alone_are_exported_of_a_model_that_has_them(tmp_path):
    model = tiny_models.CASES["qwen2_tied"]
    with pytest.raises(ValueError, match="has no adapters"):
        adapter_export.save_adapters(tmp_path / "a", model, random_params(model), "logits", "base")
    model = with_lora()
    adapter_export.save_adapters(tmp_path / "a", model, random_params(model), "logits", "base", "bfloat16")
    stored = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert stored["r"] == 3 and stored["base_model_name_or_path"] == "base"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
