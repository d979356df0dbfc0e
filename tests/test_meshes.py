"""Any mesh computes the same: random bits, losses, gradients, scores; draws differ where rounding explains it."""

import functools
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_updates
from tiny_models import one_device
from tiny_runs import ROOT, begun_again, metrics, parameters, run

from cooper_jax.configs import base, llama3p2_1b, qwen_1p5b
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig
from cooper_jax.rollout import engine, rollout_plan
from cooper_jax.rollout.differences import find_first_differences
from cooper_jax.runtime import device_layouts, mesh, optim
from cooper_jax.runtime.optim import OptimiserConfig
from cooper_jax.settings import cross_checks, setup_errors

MESHES = {"1x1x1": 1, "2x1x1": 2, "1x4x1": 4, "1x1x4": 4, "2x2x2": 8}
OVER_PROCESSES = "1x2x2 in 2 processes"


def sizes_of(name: str) -> tuple[int, int, int]:
    return mesh.parse_sizes(name.split()[0])


@functools.cache
def plain() -> dict[str, np.ndarray]:
    """On one device."""
    return tiny_updates.results(one_device())


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in (*MESHES, OVER_PROCESSES)]
)
def found(request, tmp_path_factory) -> dict[str, np.ndarray]:
    if request.param in MESHES:
        devices = jax.devices()[: MESHES[request.param]]
        return tiny_updates.results(tiny_updates.layout_of(*sizes_of(request.param), devices))
    out = tmp_path_factory.mktemp("processes") / "found.npz"
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/local_hosts.py"), "-n", "2", "--devices", "2", "--"]
        + [sys.executable, str(ROOT / "tests/tiny_updates.py"), str(out), *map(str, sizes_of(request.param))],
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return dict(np.load(out))


def test_random_bits(found):
    np.testing.assert_array_equal(found["bits"], plain()["bits"])
    assert len(np.unique(found["bits"], axis=0)) == len(found["bits"])


def test_losses_gradients_and_scores(found):
    """Within 2e-5 of the largest of a parameter's gradients, or of a metric of size 1.

    Sums of f32 in another order differ by up to 1.1e-5 of the largest.
    """
    want = plain()
    assert found.keys() == want.keys()
    names = [name for name in want if not name.startswith(("rollout/", "bits"))]
    assert (
        sum(name.startswith("grad/") for name in names) == 2 * 14 + 3 * 15
    )  # parameters, in two and three updates
    for name in names:
        scale = (
            max(1.0, np.abs(want[name]).max()) if not name.startswith("grad/") else np.abs(want[name]).max()
        )
        assert scale > 0, name
        np.testing.assert_allclose(found[name], want[name], rtol=0, atol=2e-5 * scale, err_msg=name)


def test_free_running_tokens(found):
    """The rollout's tool lists the rows that part; each did so at a draw that lay within rounding of another."""
    a, b = (tiny_updates.rollout_of(x) for x in (plain(), found))
    parted = find_first_differences(
        tiny_updates.params_of("logits"), tiny_updates.MODEL, one_device(), tiny_updates.prompts(),
        tiny_updates.POSITIONS, tiny_updates.key(), tiny_updates.SPEC, a, b, fused=False,
    )  # fmt: skip
    assert all(d.margin < 1e-5 for d in parted), parted
    same = np.setdiff1d(np.arange(len(a.tokens)), [d.row for d in parted])
    assert len(same) > len(a.tokens) // 2
    np.testing.assert_array_equal(a.tokens[same], b.tokens[same])
    np.testing.assert_allclose(a.logprobs[same], b.logprobs[same], atol=1e-5)


@pytest.mark.slow
def test_a_wrong_draw_would_be_found():
    a = tiny_updates.rollout_of(plain())
    tokens = a.tokens.copy()
    tokens[0, 0] = (tokens[0, 0] + 1) % 61
    (parted,) = find_first_differences(
        tiny_updates.params_of("logits"), tiny_updates.MODEL, one_device(), tiny_updates.prompts(),
        tiny_updates.POSITIONS, tiny_updates.key(), tiny_updates.SPEC, a, a.replace(tokens=tokens), fused=False,
    )  # fmt: skip
    assert parted.margin > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "1x1x1"])
def test_a_tiny_run_learns_the_same(name, tmp_path_factory):
    """From one step 0: the first step metric by metric, and where it moves both models.

    From then on a draw may tip, and the responses part; the second step shows that what was updated goes on.
    """
    # With 500 supervised steps the policy solves 0 to 6 % of the problems, depending on the machine's rounding,
    # and a step without a correct response has no pairs to update the reward model with.  With 1,500 steps it
    # solves a quarter.
    short = dict(steps=2, eval__every=2, checkpoint__every=1, supervised__policy_steps=1500)
    folder = tmp_path_factory.getbasetemp() / "learns"
    if not (folder / "one").exists():
        done = run(folder / "one", **short)
        assert done.returncode == 0, done.stderr
    axes = {f"mesh__{axis}": size for axis, size in zip(mesh.AXES, sizes_of(name), strict=True)}
    done = run(begun_again(folder / "one", folder / name), devices=MESHES[name], **short, **axes)
    assert done.returncode == 0, done.stderr
    ones, others = metrics(folder / "one"), metrics(folder / name)
    assert [row["step"] for row in ones] == [row["step"] for row in others] == [0, 1, 2]
    # Rows are dealt to the slots of each data shard, so how full the slots are depends on the mesh.
    of_shards = ("time/", "rollout/imbalance", "rollout/slot_use", "rollout/steps")
    for one, other in zip(ones[:2], others[:2], strict=True):
        for key, value in one.items():
            if not key.startswith(of_shards):
                assert (value is None) == (other[key] is None), key
                assert value is None or other[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    for model in ("policy", "reward"):
        start, one, other = (
            parameters(folder / where, step, model) for where, step in (("one", 0), ("one", 1), (name, 1))
        )
        moved = np.linalg.norm(one - start)
        assert moved > 0, f"the {model} model never moved"
        assert np.linalg.norm(other - one) < 0.01 * moved, model


# --- where arrays lie ----------------------------------------------------------------------------------------

PAPER = {
    "qwen_1p5b": ModelConfig(
        family="qwen2", vocab_size=151936, width=1536, layers=28, heads=12, kv_heads=2, head_dim=128, ffn=8960,
        rope_theta=1e6, rope_scaling=None, norm_eps=1e-6, qkv_bias=True, tied=True, max_len=32768,
        vocab_multiple=2048,
    ),
    "llama3p2_1b": ModelConfig(
        family="llama", vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192,
        rope_theta=5e5, rope_scaling=None, norm_eps=1e-5, qkv_bias=False, tied=True, max_len=131072,
        vocab_multiple=2048,
    ),
}  # fmt: skip
MB = 2**20


def whole_on_each_device(tree) -> set[str]:
    """Arrays of more than 1 MB, abstract or not, of which every device holds all."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, x in jax.tree.leaves_with_path(tree)
        if math.prod(x.shape) * x.dtype.itemsize > MB and x.sharding.shard_shape(x.shape) == x.shape
    }


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("head", ["logits", "score"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (2, 1, 4), (1, 1, 4)])
def test_nothing_large_is_replicated(name, head, sizes):
    """Parameters and both moments.  Keys and values alone, on a mesh of more tensor shards than they have heads."""
    layout = tiny_updates.layout_of(*sizes, jax.devices()[: math.prod(sizes)])
    opt = optim.make_optimiser(
        OptimiserConfig.from_config(base.optimiser(lr=1e-6, warmup_steps=1), "policy.optimiser")
    )
    specs = transformer.param_specs(PAPER[name], head)
    params = mesh.abstract_params(layout, specs)
    state = jax.eval_shape(lambda p: optim.TrainState(p, opt.tx.init(p), 0, 0), params)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        optim.state_shardings(opt, specs, layout),
    )
    found = whole_on_each_device(placed)
    narrow = sizes[1] == 1 and PAPER[name].kv_heads % sizes[2]
    kv = {path for path in found if path.endswith((".k", ".v"))}
    assert found == (kv if narrow else set())
    assert len(kv) == (6 if narrow else 0)  # k and v; each with two moments


def test_replication_by_accident_is_found():
    layout = tiny_updates.layout_of(1, 8, 1)
    careless = mesh.Layout(layout.mesh, tuple(r for r in layout.rules if r != ("embed", "fsdp")))
    params = mesh.abstract_params(careless, transformer.param_specs(PAPER["qwen_1p5b"]))
    assert "embed" in whole_on_each_device(params) and "layers.gate" in whole_on_each_device(params)


def wide() -> ModelConfig:
    """Large enough that its matrices count."""
    return ModelConfig(
        family="llama", vocab_size=2048, width=256, layers=2, heads=8, kv_heads=2, head_dim=32, ffn=1024,
        rope_theta=1e4, rope_scaling=None, norm_eps=1e-6, qkv_bias=False, tied=True, max_len=64,
    )  # fmt: skip


def test_arrays_lie_where_they_are_declared():
    """Of a real state after its first updates, and of the rollout's copy of the weights."""
    layout = tiny_updates.layout_of(2, 2, 2)
    config = wide()
    specs = transformer.param_specs(config)
    cfg = tiny_updates.config()
    opt = optim.make_optimiser(OptimiserConfig.from_config(cfg.policy.optimiser, "policy.optimiser"))
    state = optim.init_state(mesh.init_params(jax.random.key(0), specs, layout), opt)
    update = tiny_updates.imitation.make_imitation_update(
        config, layout, opt, dtype="float32", remat=True, microbatch=8
    )
    rows = layout.put((np.ones((8, 12), np.int32), np.ones((8, 12), bool), np.ones((8, 6), bool)), "batch")
    state, _ = update(state, *rows)
    declared = optim.state_shardings(opt, specs, layout)
    leaves, places = jax.tree.leaves_with_path(state), jax.tree.leaves(declared)
    for (path, x), place in zip(leaves, places, strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), jax.tree_util.keystr(path)
    assert whole_on_each_device(state) == set()
    for gathered, ways in ((True, 2), (False, 4)):
        copy = engine.copy_rollout_weights(state.params, config, layout, "float32", gathered)
        for name in ("gate", "q", "k", "o"):
            x = copy["layers"][0][name]
            assert x.size == ways * math.prod(x.sharding.shard_shape(x.shape)), (
                f"{name}: over tensor, and fsdp"
            )
        assert whole_on_each_device(copy) == set()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gathered", "sharded"])
def test_rollouts_do_not_depend_on_how_weights_lie(mode):
    layout = tiny_updates.layout_of(1, 4, 2)
    params = tiny_updates._placed(
        tiny_updates.params_of("logits"), transformer.param_specs(tiny_updates.MODEL), layout
    )
    drawn = engine.generate(
        params, tiny_updates.MODEL, layout, tiny_updates.prompts(), tiny_updates.POSITIONS, tiny_updates.key(),
        tiny_updates.SPEC, weight_placement=mode,
    )  # fmt: skip
    want = tiny_updates.rollout_of(plain())
    np.testing.assert_array_equal(drawn.tokens, want.tokens)
    np.testing.assert_allclose(drawn.logprobs, want.logprobs, atol=1e-5)


def test_weights_are_gathered_where_memory_allows():
    """Half a device's memory, by hand: 28 layers of Qwen2.5-1.5B and its head in bfloat16."""
    config = PAPER["qwen_1p5b"]
    layout = tiny_updates.layout_of(1, 4, 2)
    layer = 2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960 + 2 * 256 + 1536
    size = (28 * layer + 153600 * 1536) * 2 / 2 + (28 * 2 + 1) * 1536 * 2  # norms are whole on each device
    assert rollout_plan.should_gather(config, layout, "bfloat16", 2.001 * size)
    assert not rollout_plan.should_gather(config, layout, "bfloat16", 1.999 * size)
    assert rollout_plan.should_gather(config, layout, "bfloat16", None)


# --- meshes from a config ------------------------------------------------------------------------------------


def layouts(**changes):
    cfg = base.get_config()
    cfg.mesh.update(changes)
    return device_layouts.make_layouts(cfg)


def test_models_share_the_policys_mesh():
    made = layouts(data=2, fsdp=2, tensor=2)
    assert len(set(made.values())) == 1 and made["policy"].mesh.devices.shape == (2, 2, 2)


def test_models_apart():
    """The last devices are set aside, in the order of the names; the policy has the rest."""
    made = layouts(reward="1x2x1", assistant="1x1x1")
    ids = {name: [d.id for d in layout.mesh.devices.flat] for name, layout in made.items()}
    rest = [0, 1, 2, 3, 4]
    assert ids == {"policy": rest, "reference": rest, "rollout": rest, "reward": [6, 7], "assistant": [5]}
    assert made["reward"].mesh.shape["fsdp"] == 2 and made["policy"].mesh.shape["fsdp"] == 5


class Chip:
    """A device of a host, as far as `split_devices` looks."""

    def __init__(self, index, host):
        self.id, self.process_index = index, host


def test_every_host_gives_its_part():
    chips = [Chip(i, i // 4) for i in range(16)]
    left, taken = mesh.split_devices(chips, {"reward": (1, 8, 1), "assistant": (4, 1, 1)})
    assert [c.id for c in taken["reward"]] == [2, 3, 6, 7, 10, 11, 14, 15]
    assert [c.id for c in taken["assistant"]] == [1, 5, 9, 13]
    assert [c.id for c in left] == [0, 4, 8, 12]


@pytest.mark.parametrize("sizes", [(1, 6, 1), (1, 16, 1)])
def test_hosts_that_cannot_give_alike(sizes):
    with pytest.raises(
        ValueError, match=r"mesh\.reward=1x\d+x1 takes \d+ devices, as many from each of 4 hosts"
    ):
        mesh.split_devices([Chip(i, i // 4) for i in range(16)], {"reward": sizes})


@pytest.mark.parametrize("changes, words", [
    (dict(reward="2x2"), "mesh.reward"),
    (dict(reward="1x0x1"), "1x2x1"),
    (dict(across="rows"), "mesh.across='rows'"),
    (dict(fsdp=3), "holds 3 devices, but there are 8"),
])  # fmt: skip
def test_meshes_that_cannot_be(changes, words):
    with pytest.raises(setup_errors.SetupError, match=words):
        layouts(**changes)


@pytest.mark.parametrize("section, field, value, words", [
    ("reward", "arm", "rule", "the rule arm has no reward model"),
    ("mesh", "assistant", "1x1x1", "assistant.kind=local"),
])  # fmt: skip
def test_a_mesh_for_nobody(section, field, value, words):
    cfg = base.get_config()
    cfg.data.format, cfg.mesh.reward = "synthetic", "1x1x1"
    cfg[section][field] = value
    with pytest.raises(setup_errors.SetupError, match=words):
        cross_checks.check_cross_sections(cfg)


def test_slices_are_crossed_by_one_axis():
    """Two slices of four: on the axis across them neighbours lie in both, on the others in one."""

    class Device:
        platform = "cpu"

        def __init__(self, index):
            self.id, self.slice_index, self.process_index = index, index // 4, index // 4
            self.device_kind = "chip"

    devices = [Device(i) for i in range(8)]
    for across, sizes in (("data", (2, 2, 2)), ("fsdp", (1, 4, 2))):
        slices = np.vectorize(lambda d: d.slice_index)(
            mesh._arrange(devices, list(sizes), mesh.AXES.index(across))
        )
        axis = mesh.AXES.index(across)
        assert (np.sort(slices, axis=axis) == slices).all()
        for other in {0, 1, 2} - {axis}:
            assert (slices == slices.take([0], axis=other)).all()
    with pytest.raises(ValueError, match="2 slices, which do not divide data=1"):
        mesh._arrange(devices, [1, 4, 2], 0)


@pytest.mark.parametrize("module", [qwen_1p5b, llama3p2_1b])
def test_vocabularies_are_padded_until_they_divide(module):
    cfg = module.get_config()
    cfg.mesh.update(fsdp=1, tensor=8)
    layout = device_layouts.make_policy_layout(cfg)
    assert layout.first_ways("vocab") == 8 and math.lcm(cfg.policy.vocab_multiple, 8) == 2048
    three = tiny_updates.layout_of(1, 2, 3, jax.devices()[:6])
    assert PAPER["qwen_1p5b"].padded_vocab % 3 == 0 or math.lcm(2048, three.first_ways("vocab")) == 6144
