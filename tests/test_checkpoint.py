"""Checkpoints come back bit for bit, on any mesh, after any kill; what is damaged is named."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cooper_jax.runtime import checkpoint
from cooper_jax.runtime.checkpoint import Checkpoints, abstract_like, join_state, list_steps, split_state
from cooper_jax.runtime.mesh import make_mesh
from cooper_jax.types import TrainState

ROOT = str(Path(__file__).resolve().parents[1])


def awkward(shape, seed=0):
    """f32 of every exponent, with a NaN, infinities, a negative zero and a denormal among them."""
    bits = np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)
    values = bits.view(np.float32).copy()
    values.flat[:5] = [np.nan, np.inf, -np.inf, -0.0, 1e-42]
    return values


def bits(tree):
    """Every leaf as (path, dtype, shape, bytes)."""

    def raw(x):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return [(jax.tree_util.keystr(path), *raw(x)) for path, x in jax.tree.leaves_with_path(tree)]


def make_state(seed=0):
    params = {
        "embed": jnp.asarray(awkward((16, 8), seed)),
        "layers": {"q": jnp.asarray(awkward((2, 8, 8), seed + 1))},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1e-3, 10)))
    opt_state = tx.init(params)
    # Moments that are not zero: awkward bits there as well.
    opt_state = jax.tree.map(
        lambda x: jnp.asarray(awkward(x.shape, seed + 2)) if x.ndim else x + 7, opt_state
    )
    return TrainState(params=params, opt_state=opt_state, updates=jnp.int32(11), skipped=jnp.int32(-(2**31)))


def place(tree, sizes, devices):
    """Put a tree on a mesh, leading dimensions over fsdp and tensor where they divide."""
    mesh = make_mesh(*sizes, devices=jax.devices()[:devices])

    def put(x):
        axes = [
            axis if x.shape[i] % mesh.shape[axis] == 0 else None
            for i, axis in zip(range(x.ndim), ("fsdp", "tensor"), strict=False)
        ]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(put, tree)


def save(run_dir, step, tree, **loop):
    with Checkpoints(run_dir, keep=0) as kept:
        kept.save(step, {"policy": tree}, loop)


def test_only_the_loop_looks_for_a_sigterm(tmp_path, monkeypatch):
    """A look by Orbax's manager would replace the number of the check at which all processes stop."""
    looks = []
    monkeypatch.setattr("orbax.checkpoint.utils.reached_preemption", lambda step: bool(looks.append(step)))
    save(tmp_path, 1, {"w": jnp.ones(3)}, position=1)
    save(tmp_path, 2, {"w": jnp.ones(3)}, position=2)
    assert looks == []


def test_split_and_join():
    state = make_state()
    params, optimiser = split_state(state)
    assert params is state.params and sorted(optimiser) == ["opt_state", "skipped", "updates"]
    assert jax.tree.structure(join_state(params, optimiser)) == jax.tree.structure(state)


def test_round_trip_is_bit_exact(tmp_path):
    state = place(make_state(), (1, -1, 1), 8)
    params, optimiser = split_state(state)
    other = {
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(1), 3),
        "half": jnp.ones(3, jnp.bfloat16),
    }
    items = {"policy": params, "policy_optimiser": optimiser, "other": place(other, (1, -1, 1), 8)}
    with Checkpoints(tmp_path, keep=2) as kept:
        kept.save(4, items, {"position": 512, "config_hash": "abc", "nested": {"a": [1, 2.5, None]}})
        kept.wait()
        back = {name: kept.restore(4, name, abstract_like(tree)) for name, tree in items.items()}
        assert bits(back) == bits(items)
        assert jax.tree.structure(back) == jax.tree.structure(items)  # optax's own state types, not dicts
        assert all(
            a.sharding == b.sharding
            for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(items), strict=True)
        )
        record = kept.loop(4)
        assert record.pop("checksums").keys() == {"other", "policy", "policy_optimiser"}
        assert len(record.pop("digest")) == 64
        assert record == {
            "step": 4, "format": 1, "items": ["other", "policy", "policy_optimiser"],
            "position": 512, "config_hash": "abc", "nested": {"a": [1, 2.5, None]},
        }  # fmt: skip
    assert bits(join_state(back["policy"], back["policy_optimiser"])) == bits(state)


def test_weights_restore_without_optimisers(tmp_path):
    params, optimiser = split_state(make_state())
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(1, {"policy": params, "policy_optimiser": optimiser}, {})
    for path in (tmp_path / "checkpoints/1/policy_optimiser").rglob("*"):
        if path.is_file() and path.name not in ("_METADATA", "commit_success.txt"):
            path.unlink()
    with Checkpoints(tmp_path, keep=1, read_only=True) as kept:
        assert bits(kept.restore(1, "policy", abstract_like(params))) == bits(params)


def test_restores_onto_other_meshes(tmp_path):
    state = make_state()
    places = {
        "four": ((1, 2, 2), 4), "eight": ((1, 8, 1), 8), "one": ((1, 1, 1), 1), "cube": ((2, 2, 2), 8),
        "again": ((1, 2, 2), 4),
    }  # fmt: skip
    current = place(state, *places["four"])
    for i, (name, (sizes, devices)) in enumerate(places.items()):
        save(tmp_path / name, i, current)
        like = abstract_like(place(state, sizes, devices))
        with Checkpoints(tmp_path / name, keep=1) as kept:
            current = kept.restore(i, "policy", like)
        assert bits(current) == bits(state)
        assert [x.sharding for x in jax.tree.leaves(current)] == [x.sharding for x in jax.tree.leaves(like)]


def padded_state(rows: int, vocab: int = 13):
    """A state whose vocabulary of 13 is padded with zeros to so many rows, moments too."""

    def real(shape, seed):
        return np.concatenate([awkward((vocab, *shape), seed), np.zeros((rows - vocab, *shape), np.float32)])

    def tree(seed):
        values = {"embed": real((8,), seed), "lm_head": real((8,), seed + 1)}
        return jax.tree.map(jnp.asarray, values | {"layers": {"q": awkward((2, 8, 8), seed + 2)}})

    params = tree(0)
    adam, *rest = optax.adamw(1e-3).init(params)
    opt_state = (adam._replace(count=adam.count + 7, mu=tree(3), nu=tree(6)), *rest)
    return TrainState(params, opt_state, jnp.int32(3), jnp.int32(0))


@pytest.mark.parametrize("stored, asked", [(14, 16), (16, 14), (16, 13), (13, 20), (16, 16)])
def test_a_vocabulary_padded_otherwise(tmp_path, stored, asked):
    """As another mesh wants it: zeros come or go behind the real rows of weights and moments, and nothing else."""
    state = padded_state(stored)
    params, optimiser = split_state(place(state, (1, 4, 1), 4))
    items = {"policy": params, "policy_optimiser": optimiser}
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(1, items, {})
        kept.wait()
        expected = place(padded_state(asked), (2, 2, 2), 8)
        likes = dict(zip(items, map(abstract_like, split_state(expected)), strict=True))
        step, found, _ = kept.restore_newest(likes, dict.fromkeys(likes, 13))
        assert step == 1 and bits(join_state(*found.values())) == bits(expected)
        assert [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(likes)]
        assert bits(kept.restore(1, "policy", likes["policy"], vocab_size=13)) == bits(expected.params)


def test_real_rows_are_not_left_off(tmp_path):
    params, optimiser = split_state(padded_state(16))
    save(tmp_path, 1, params)
    with Checkpoints(tmp_path, keep=1) as kept:
        for rows, vocab_size in ((14, None), (14, 15), (12, 13), (16, 17)):
            like = abstract_like(padded_state(max(rows, 13)).params)
            like["embed"] = jax.ShapeDtypeStruct((rows, 8), jnp.float32, sharding=like["embed"].sharding)
            if rows == 16:  # as stored: nothing to ask
                assert bits(kept.restore(1, "policy", like, vocab_size)) == bits(params)
                continue
            with pytest.raises(
                ValueError, match=rf"embed is stored as float32\[16, 8\], asked for as float32\[{rows}, 8"
            ):
                kept.restore(1, "policy", like, vocab_size)
        like = abstract_like(padded_state(14).params)
        for change, message in (
            ({"embed": (14, 9)}, r"embed is stored as float32\[16, 8\], asked for as float32\[14, 9\]"),
            ({"layers": {"q": (3, 8, 8)}}, r"layers.q is stored as float32\[2, 8, 8\]"),  # no other leaf
        ):
            other = jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=like["embed"].sharding),
                change, is_leaf=lambda x: isinstance(x, tuple),
            )  # fmt: skip
            with pytest.raises(ValueError, match=message):
                kept.restore(1, "policy", like | other, vocab_size=13)


def test_the_reference_may_be_padded_otherwise(tmp_path):
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save_reference(padded_state(16).params)
        like = abstract_like(padded_state(14).params)
        assert bits(kept.restore_reference(like, vocab_size=13)) == bits(padded_state(14).params)
        with pytest.raises(ValueError, match="reference does not fit"):
            kept.restore_reference(like)


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    """The background writer must hold its own copy: what it reads is gone when `save` returns."""
    x = place({"w": jnp.arange(2.0**20)}, (1, 8, 1), 8)
    before = bits(x)
    step = jax.jit(lambda t: jax.tree.map(lambda v: v * -3.0 + 1.0, t), donate_argnums=0)
    with Checkpoints(tmp_path, keep=0) as kept:
        kept.save(0, {"policy": x}, {})
        for _ in range(5):
            x = step(x)
        kept.wait()
        assert bits(kept.restore(0, "policy", abstract_like(x))) == before


def test_keeps_the_newest(tmp_path):
    tree = {"w": jnp.zeros(3)}
    with Checkpoints(tmp_path / "two", keep=2) as kept:
        assert (
            kept.newest() is None and kept.restore_newest({}) is None and list_steps(tmp_path / "two") == []
        )
        for step in (0, 5, 10, 11):
            kept.save(step, {"policy": tree}, {})
        kept.wait()
        assert kept.steps() == [10, 11] and kept.newest() == 11
    assert list_steps(tmp_path / "two") == [10, 11] and list_steps(tmp_path / "nowhere") == []
    with Checkpoints(tmp_path / "all", keep=0) as kept:
        for step in range(4):
            kept.save(step, {"policy": tree}, {})
    assert list_steps(tmp_path / "all") == [0, 1, 2, 3]


def test_what_cannot_be_saved(tmp_path):
    tree = {"w": jnp.zeros(3)}
    with pytest.raises(ValueError, match="keep is -1"):
        Checkpoints(tmp_path, keep=-1)
    with Checkpoints(tmp_path, keep=2) as kept:
        kept.save(3, {"policy": tree}, {})
        for step in (3, 2):
            with pytest.raises(ValueError, match=rf"step {step} is not newer than .*checkpoints/3"):
                kept.save(step, {"policy": tree}, {})
        with pytest.raises(ValueError, match="'loop'"):
            kept.save(4, {"loop": tree}, {})
        with pytest.raises(ValueError, match=r"fields \['format'\]"):
            kept.save(4, {"policy": tree}, {"format": 3})
        with pytest.raises(TypeError, match="JSON"):
            kept.save(4, {"policy": tree}, {"array": np.zeros(2)})
        kept.wait()
        assert kept.steps() == [3]


def test_a_save_waits_for_the_disk_only_if_it_must(tmp_path, monkeypatch):
    """The pause is that of the copy; the one before is waited for, and the seconds are told."""
    write = checkpoint.ocp.JsonCheckpointHandler._save_fn
    slow = [1.0]

    async def save_slowly(self, x, directory):
        await asyncio.sleep(slow[0])
        return await write(self, x, directory)

    monkeypatch.setattr(checkpoint.ocp.JsonCheckpointHandler, "_save_fn", save_slowly)
    with Checkpoints(tmp_path, keep=1) as kept:
        began = time.monotonic()
        assert kept.save(1, {"policy": {"w": jnp.zeros(9)}}, {}) < 0.5
        pause = time.monotonic() - began
        assert kept.steps() == [] and pause < 0.9
        waited = kept.save(2, {"policy": {"w": jnp.zeros(9)}}, {})
        assert 0.1 < waited <= time.monotonic() - began and kept.steps() == [1]
        slow[0] = 0.0
    assert list_steps(tmp_path) == [2]


FULL = """
import resource, sys
import jax.numpy as jnp, numpy as np
sys.path.insert(0, sys.argv[1])
from cooper_jax.runtime.checkpoint import Checkpoints
noise = jnp.asarray(np.random.default_rng(0).normal(size=2**19), jnp.float32)
with Checkpoints(sys.argv[2], keep=1) as kept:
    kept.save(1, {"policy": {"w": noise[:99]}}, {})
    kept.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))
    kept.save(2, {"policy": {"w": noise}}, {})
    print("saving", flush=True)
    if sys.argv[3] == "wait":
        kept.wait()
    else:
        kept.save(3, {"policy": {"w": noise[:99]}}, {})
    print("not raised", flush=True)
"""


@pytest.mark.parametrize("call", ["wait", "save"])
def test_a_save_that_fails_is_raised(tmp_path, call):
    """No file may grow over 256 KiB, as on a full disk: the former checkpoint stays, and the run hears of it."""
    child = subprocess.run(
        [sys.executable, "-c", FULL, ROOT, str(tmp_path), call], capture_output=True, text=True
    )
    assert child.returncode == 1 and child.stdout == "saving\n", child.stderr
    wanted = (
        rf"OSError: {tmp_path}/checkpoints: the checkpoint of step 2 could not be written \(.*File too large.*\); "
        r"that of step 1 is complete\.  Free disk space"
    )
    assert re.search(wanted, child.stderr), child.stderr
    assert list_steps(tmp_path) == [1]
    noise = {"w": jnp.asarray(np.random.default_rng(0).normal(size=2**19)[:99], jnp.float32)}
    with Checkpoints(tmp_path, keep=1) as kept:
        step, found, _ = kept.restore_newest({"policy": abstract_like(noise)})
        assert step == 1 and bits(found["policy"]) == bits(noise)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_what_does_not_fit_is_named_and_not_set_aside(tmp_path):
    save(tmp_path, 1, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)})
    here = jnp.zeros(1).sharding

    def like(**shapes):
        return {n: jax.ShapeDtypeStruct(s, t, sharding=here) for n, (s, t) in shapes.items()}

    cases = {
        r"1/policy does not fit.*a is stored as float32\[2, 3\], asked for as float32\[3, 2\]": like(
            a=((3, 2), jnp.float32), b=((4,), jnp.float32)
        ),
        r"b is stored as float32\[4\], asked for as bfloat16\[4\]": like(
            a=((2, 3), jnp.float32), b=((4,), jnp.bfloat16)
        ),
        "c is not stored; b is stored but not asked for": like(
            a=((2, 3), jnp.float32), c=((4,), jnp.float32)
        ),
        "a is asked for without a sharding": {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
    }
    with Checkpoints(tmp_path, keep=1) as kept:
        for message, tree in cases.items():
            with pytest.raises(ValueError, match=message):
                kept.restore(1, "policy", tree)
            with pytest.raises(ValueError, match=message):
                kept.restore_newest({"policy": tree})
        with pytest.raises(KeyError, match="no item 'reward'; it has policy"):
            kept.restore(1, "reward", {})
        with pytest.raises(FileNotFoundError, match=r"the checkpoints are \[1\]"):
            kept.loop(2)
        assert kept.steps() == [1]


def test_another_format_is_an_error(tmp_path, monkeypatch):
    save(tmp_path, 1, {"a": jnp.zeros(2)})
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with Checkpoints(tmp_path, keep=1) as kept:
        with pytest.raises(
            ValueError, match="checkpoints/1 is a checkpoint of format 1; this code reads format 2"
        ):
            kept.newest()
    assert list_steps(tmp_path) == [1]


def damage(path: Path, how: str):
    if how == "loop":
        (path / "loop/metadata").write_text('{"step": 2, "form')
    elif how == "no loop":
        (path / "loop/metadata").unlink()
    elif how == "table":
        (path / "policy/_METADATA").write_text("")
    elif how == "no table":
        (path / "policy/_METADATA").unlink()
    elif how == "manifest":
        (path / "policy/manifest.ocdbt").write_bytes(b"")
    elif how == "data":
        for file in (path / "policy").rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "values":  # the tables are whole, the numbers are not
        for file in (path / "policy/ocdbt.process_0/d").iterdir():
            file.write_bytes(b"x")
    else:
        raise AssertionError(how)


@pytest.mark.parametrize("how", ["loop", "no loop", "table", "no table", "manifest", "data", "values"])
def test_an_unreadable_newest_checkpoint_gives_way_to_the_one_before(tmp_path, how):
    trees = {step: {"w": jnp.asarray(awkward((64, 64), step))} for step in (1, 2)}
    for step, tree in trees.items():
        save(tmp_path, step, tree, position=step * 10)
    damage(tmp_path / "checkpoints/2", how)
    with Checkpoints(tmp_path, keep=2) as kept:
        with pytest.warns(UserWarning, match=r"checkpoints/2/.* cannot be read.*it is now 2\.unreadable"):
            step, items, loop = kept.restore_newest({"policy": abstract_like(trees[1])})
        assert step == 1 and loop["position"] == 10 and bits(items["policy"]) == bits(trees[1])
        assert kept.newest() == 1
        kept.save(2, {"policy": trees[2]}, {})  # the way is free again
    assert list_steps(tmp_path) == [1, 2] and (tmp_path / "checkpoints/2.unreadable").is_dir()

    with Checkpoints(tmp_path, keep=2) as kept:
        assert kept.newest() == 2


def overwrite(folder, tree):
    """Replace the arrays of an item, and leave the checkpoint's record as it is."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree, force=True)


@pytest.mark.parametrize("name", ["w", "embed", "count"])
def test_a_changed_bit_is_damage(tmp_path, name):
    """Anywhere in an array of any type, in one with padding and in one of a single element."""
    tree = {
        "w": jnp.asarray(awkward((5, 7, 3))).astype(jnp.bfloat16),
        "embed": jnp.asarray(awkward((16, 4), 1)).at[12:].set(0),
        "count": jnp.int32(-3),
    }
    rng = np.random.default_rng(2)
    for step in (1, 2):
        with Checkpoints(tmp_path, keep=0) as kept:
            kept.save(step, {"policy": tree}, {}, {"policy": 12})
    changed = np.array(tree[name])
    words = changed.reshape(-1).view(f"u{changed.dtype.itemsize}")
    place = rng.integers(len(words) * 3 // 4 or 1)
    words[place] ^= 1 << int(rng.integers(8 * changed.dtype.itemsize))
    overwrite(tmp_path / "checkpoints/2/policy", tree | {name: jnp.asarray(changed)})

    with Checkpoints(tmp_path, keep=1) as kept:
        with pytest.raises(
            checkpoint.Unreadable, match=rf"checkpoints/2/policy is damaged.*{name} are not what"
        ):
            kept.restore(2, "policy", abstract_like(tree), 12)
        with pytest.warns(UserWarning, match=r"2/policy is damaged.*it is now 2\.unreadable"):
            step, items, _ = kept.restore_newest({"policy": abstract_like(tree)}, {"policy": 12})
        assert step == 1 and bits(items["policy"]) == bits(tree)


def test_a_changed_record_is_damage(tmp_path):
    """The position in the data, for one, decides what the run reads next."""
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(2, {"policy": {"a": jnp.ones(3)}}, {"position": 4})
        kept.wait()
        [file] = [
            path
            for path in (tmp_path / "checkpoints/2/loop").iterdir()
            if b'"position": 4' in path.read_bytes()
        ]
        content = file.read_bytes()
        file.write_bytes(content.replace(b'"position": 4', b'"position": 5'))
        with pytest.raises(checkpoint.Unreadable, match="2/loop is damaged: by its digest"):
            kept.loop(2)
        # As an earlier version wrote it.
        record = json.loads(content)
        del record["digest"]
        file.write_text(json.dumps(record))
        assert kept.loop(2)["position"] == 4


def test_a_changed_bit_of_a_file_never_passes_for_a_weight(tmp_path):
    tree = {"w": jnp.asarray(awkward((64, 64)))}
    save(tmp_path, 1, tree)
    files = [
        f for f in (tmp_path / "checkpoints/1/policy").rglob("*") if f.is_file() and "d" in f.parent.name
    ]
    data, rng, damaged = max(files, key=lambda file: file.stat().st_size), np.random.default_rng(0), 0
    whole = data.read_bytes()
    for place in rng.integers(len(whole), size=24):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        data.write_bytes(changed)
        with Checkpoints(tmp_path, keep=1, read_only=True) as kept:
            try:
                assert bits(kept.restore(1, "policy", abstract_like(tree))) == bits(tree)
            except checkpoint.Unreadable:
                damaged += 1
    assert damaged >= 20


def test_checkpoints_without_checksums_are_read(tmp_path):
    """Those of earlier commits."""
    tree = {"w": jnp.arange(4.0)}
    save(tmp_path, 1, tree)
    files = (file for file in (tmp_path / "checkpoints/1/loop").rglob("*") if file.is_file())
    (record,) = (file for file in files if b"checksums" in file.read_bytes())
    content = json.loads(record.read_text())
    del content["checksums"], content["digest"]
    record.write_text(json.dumps(content))
    with Checkpoints(tmp_path, keep=1) as kept:
        step, items, _ = kept.restore_newest({"policy": abstract_like(tree)})
        assert step == 1 and bits(items["policy"]) == bits(tree)


def test_a_changed_reference_is_named(tmp_path):
    tree = {"w": jnp.asarray(awkward((16, 4)))}
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save_reference(tree)
        overwrite(kept.reference, {"w": tree["w"].at[3, 2].multiply(2.0)})
        with pytest.raises(checkpoint.Unreadable, match="reference is damaged.*w are not what was saved"):
            kept.restore_reference(abstract_like(tree))


def test_damaged_checkpoints_displace_no_good_one(tmp_path):
    """With keep=1: a damaged one, and folders that a cut-off copy has left, do not count."""
    tree = {"w": jnp.arange(4.0)}
    for step in (14, 16):
        save(tmp_path, step, tree)
    damage(tmp_path / "checkpoints/16", "loop")
    (tmp_path / "checkpoints/18").mkdir()
    (tmp_path / "checkpoints/20/policy").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=1) as kept:
        assert 14 in list_steps(tmp_path), "nothing is deleted before the newest one was read"
        with pytest.warns(UserWarning, match="unreadable"):
            assert kept.newest() == 14
        kept.save(15, {"policy": tree}, {})
    assert list_steps(tmp_path) == [15]


def test_a_damaged_older_checkpoint_is_not_kept_in_place_of_a_good_one(tmp_path):
    tree = {"w": jnp.arange(4.0)}
    for step in (1, 2, 3):
        save(tmp_path, step, tree)
    damage(tmp_path / "checkpoints/2", "loop")
    with Checkpoints(tmp_path, keep=3) as kept:
        kept.save(4, {"policy": tree}, {})
        kept.wait()
        assert list_steps(tmp_path) == [1, 2, 3, 4]
    with Checkpoints(tmp_path, keep=2) as kept:
        kept.save(5, {"policy": tree}, {})
    assert list_steps(tmp_path) == [4, 5]


def test_no_readable_checkpoint_is_an_error(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, {"w": jnp.zeros(2)})
        damage(tmp_path / f"checkpoints/{step}", "loop")
    with Checkpoints(tmp_path, keep=2) as kept, pytest.warns(UserWarning):
        with pytest.raises(ValueError, match=r"no checkpoint is left.*/2/loop.*/1/loop.*new run_dir"):
            kept.newest()


def test_read_only_touches_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        Checkpoints(tmp_path, keep=1, read_only=True)
    tree = {"w": jnp.arange(4.0)}
    save(tmp_path, 1, tree)
    unfinished = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(tmp_path, keep=1, read_only=True) as kept:
        assert kept.steps() == [1] and bits(kept.restore(1, "policy", abstract_like(tree))) == bits(tree)
        damage(tmp_path / "checkpoints/1", "loop")
        with pytest.raises(checkpoint.Unreadable, match="checkpoints/1/loop"):
            kept.newest()
    assert unfinished.is_dir() and list_steps(tmp_path) == [1]


def test_a_reference_without_its_checksums_is_refused(tmp_path):
    """They cannot be lost in silence; a run of an earlier version gets them when it is resumed."""
    tree = {"w": jnp.arange(8.0)}
    sums = tmp_path / "reference_checksums.json"
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save_reference(tree)
        stored = sums.read_bytes()
        sums.unlink()
        with pytest.raises(
            FileNotFoundError, match="reference_checksums.json is not there.*bring the file back"
        ):
            kept.restore_reference(abstract_like(tree), has_checksums=True)
        assert not sums.exists()
        kept.restore_reference(abstract_like(tree))
        assert sums.read_bytes() == stored
        kept.restore_reference(abstract_like(tree), has_checksums=True)
        for damaged in ("", "null", "[]", "{}", '{"arrays": []}'):
            sums.write_text(damaged)
            with pytest.raises(checkpoint.Unreadable, match="reference_checksums.json cannot be read"):
                kept.restore_reference(abstract_like(tree))


def test_the_reference_is_kept_once(tmp_path):
    tree = place({"w": jnp.asarray(awkward((16, 4)))}, (1, 8, 1), 8)
    elsewhere = place(tree, (2, 2, 2), 8)
    with Checkpoints(tmp_path, keep=1) as kept:
        with pytest.raises(FileNotFoundError, match="reference is not there"):
            kept.restore_reference(abstract_like(tree))
        kept.save_reference({"w": jnp.zeros((16, 4))})  # a start that never reached a checkpoint
        kept.save_reference(tree)
        kept.save(1, {"policy": tree}, {})
        assert bits(kept.restore_reference(abstract_like(elsewhere))) == bits(tree)
        with pytest.raises(ValueError, match=r"belongs to the checkpoints \[1\]"):
            kept.save_reference(tree)
        with pytest.raises(ValueError, match="reference does not fit"):
            kept.restore_reference(abstract_like({"v": tree["w"]}))
        assert kept.steps() == [1]


KILLED = """
import sys
import jax, jax.numpy as jnp
sys.path.insert(0, sys.argv[1])
from cooper_jax.runtime.checkpoint import Checkpoints
with Checkpoints(sys.argv[2], keep=1) as kept:
    step = kept.newest()
    step = 0 if step is None else step + 1
    print("ready", flush=True)
    while True:
        tree = {str(i): jnp.full((256, 1024), step, jnp.int32) for i in range(24)}
        kept.save(step, {"policy": tree, "policy_optimiser": {"count": jnp.int32(step)}}, {"position": step})
        print(step, flush=True)
        step += 1
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """SIGKILL at random moments of an endless row of saves, each of which also deletes its predecessor.

    Four lives, and more until a kill has fallen into a save and a second save has ended.
    """
    chance = random.Random(0)
    folder = tmp_path / "checkpoints"
    here = jnp.zeros(1).sharding
    like = {str(i): jax.ShapeDtypeStruct((256, 1024), jnp.int32, sharding=here) for i in range(24)}
    newest, unfinished = -1, 0
    for life in range(12):
        if life >= 4 and unfinished and newest >= 1:
            break  # on a busy machine an aimed kill may come after the save
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, ROOT, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )  # fmt: skip
        for line in child.stdout:
            if line.strip().isdecimal():
                break  # the first save of this life is under way
        else:
            pytest.fail(child.communicate()[1])
        time.sleep(chance.uniform(0.0, 0.4))
        deadline = time.monotonic() + 60
        while life % 2 and time.monotonic() < deadline and not any("tmp" in p.name for p in folder.iterdir()):
            pass  # every other kill is aimed at a save
        os.kill(child.pid, signal.SIGKILL)
        told = [int(line) for line in (line, *child.communicate()[0].split())]
        unfinished += any("tmp" in p.name for p in folder.iterdir())

        with Checkpoints(tmp_path, keep=1) as kept:
            found = kept.restore_newest({"policy": like})
        assert len([p for p in folder.iterdir()]) == (found is not None)  # no leftovers
        # save(s) waits for save(s - 1): once s is announced, s - 1 is certainly complete.
        assert found is not None or told == [0]
        if found is not None:
            step, items, loop = found
            assert step >= max(newest, told[-1] - 1) and loop["position"] == step
            assert all((np.asarray(x) == step).all() for x in jax.tree.leaves(items))
            newest = step
    assert newest >= 1 and unfinished >= 1, "no kill fell into a save: the test has shown nothing"


TWO = """
import atexit, sys, threading, warnings
# Called after all that is registered later.  A watching thread that were still there could abort the process.
atexit.register(lambda: print("left:", [t.name for t in threading.enumerate() if "_watch" in t.name], flush=True))
root, run_dir = sys.argv[1:]
sys.path.insert(0, root)
from cooper_jax.runtime import hosts
hosts.start_hosts()
import jax, numpy as np
from pathlib import Path
from cooper_jax.runtime.checkpoint import Checkpoints, abstract_like
from cooper_jax.runtime.mesh import make_mesh
from cooper_jax.runtime.run_directory import check_shared
from jax.sharding import NamedSharding, PartitionSpec
me = jax.process_index()
try:
    check_shared(run_dir.replace("ME", str(me)))
except ValueError as error:
    print(error, flush=True)
    sys.exit()
values = np.arange(4096, dtype=np.float32)
sharding = NamedSharding(make_mesh(1, 4, 1), PartitionSpec("fsdp"))
tree = {"w": jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])}
with Checkpoints(run_dir, keep=2) as kept:
    kept.save_reference(tree)
    for step in (1, 2, 3):
        kept.save(step, {"policy": tree}, {})
    kept.wait()
    assert kept.steps() == [2, 3], kept.steps()
    if me == 0:  # of the arrays, what the other process wrote: this one could read all its own
        for file in Path(run_dir, "checkpoints/3/policy/ocdbt.process_1/d").iterdir():
            file.write_bytes(b"x")
    hosts.exchange_bytes("damaged", b"")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step, found, _ = kept.restore_newest({"policy": abstract_like(tree)})
    assert any("it is now 3.unreadable" in str(w.message) for w in said)
    for back in (found["policy"], kept.restore_reference(abstract_like(tree))):
        for shard in back["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])
    print("restored", step, kept.steps(), flush=True)
"""


@pytest.mark.parametrize("disk", ["shared", "apart"])
def test_two_processes(tmp_path, disk):
    """Each writes its own half; what one alone cannot read is set aside by both.  With disks apart, an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    run_dir = str(tmp_path / ("run" if disk == "shared" else "runME"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, ROOT, run_dir],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i),
            },
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        for i, process in enumerate(processes):
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-3000:]
            assert out.splitlines()[-1] == "left: []"
            if disk == "shared":
                assert out.splitlines()[-2] == "restored 2 [2]"
            else:
                assert (
                    f"{tmp_path}/run{i} is not one directory for all hosts" in out
                    and "process 1 did not" in out
                )
    finally:
        for process in processes:
            process.kill()
    if disk == "shared":
        assert sorted(p.name for p in tmp_path.glob("run/*")) == [
            "checkpoints",
            "reference",
            "reference_checksums.json",
        ]  # no mark is left


def test_half_deleted_checkpoints_are_not_seen(tmp_path):
    save(tmp_path, 3, {"w": jnp.zeros(2)})
    (tmp_path / "checkpoints/2.deleted/policy").mkdir(parents=True)
    (tmp_path / "checkpoints/4.orbax-checkpoint-tmp/policy").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=1) as kept:
        assert kept.steps() == [3] and kept.newest() == 3
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_says_nothing(tmp_path, caplog, capfd):
    """Orbax warns readily; a run's screen belongs to the run."""
    tree = {"w": jnp.arange(4.0)}
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save_reference(tree)
        for step in (1, 2):
            kept.save(step, {"policy": tree}, {})
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.restore_newest({"policy": abstract_like(tree)})
        kept.restore_reference(abstract_like(tree))
    assert caplog.records == [] and capfd.readouterr() == ("", "")
