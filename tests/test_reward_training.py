"""Training a reward model alone: parity with torch, batches, resuming, learning, what is kept, what is refused."""

import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import report_runs
import tiny_models
from safetensors.numpy import load_file
from test_files import Bucket, bucket  # noqa: F401
from tiny_reward_training import load_examples, run_config, write_place, write_task
from tiny_runs import ROOT, environment, metrics, start_hosts, timeless

from cooper_jax.configs import base
from cooper_jax.data import labelled_completions, prompts, seen_questions
from cooper_jax.model import loading, transformer, weight_export, weights
from cooper_jax.model import tokenizer as tokenizers
from cooper_jax.reward import calibration, verifier_model
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.reward_training import batches, best_model, examples, rm_loop, rm_report
from cooper_jax.runtime import device_layouts, hosts, mesh, optim
from cooper_jax.runtime.mesh import Layout
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.setup import build_reward_bundle
from cooper_jax.types import ScoreBatch, Triple

RULES = base.get_config().mesh.rules
# With Adam's usual eps of 1e-8 the first step is a sign: rounding noise would count in full.
OPT = dataclasses.replace(
    optim.OptimiserConfig.from_config(base.optimiser(lr=1e-2, warmup_steps=0), "train_rm.optimiser"), eps=1e-3
)


def one_device(*_) -> Layout:
    return tiny_models.one_device()


@pytest.fixture
def alone(monkeypatch):
    """Runs in this process have one of its devices."""
    monkeypatch.setattr(device_layouts, "make_policy_layout", one_device)


def section(**changes):
    c = base.get_config().reward
    c.update(changes)
    return RewardUpdateConfig.from_config(c)


def random_rows(config, seed=0, n=11, longest=40):
    """Token lists of 3 to `longest` tokens, none of them 0, and labels of both kinds."""
    rng = np.random.default_rng(seed)
    lengths = np.append(rng.integers(3, longest, n - 1), longest)
    rows = [rng.integers(1, config.vocab_size, length).tolist() for length in lengths]
    return rows, lengths, np.arange(n) % 2 * 1.0


def pieces(rows, lengths, labels, shapes, multiple=1):
    """A batch of all rows as what an Accumulator adds."""
    out = []
    for m in batches.split_microbatches(np.arange(len(rows)), lengths, shapes):
        shares = np.zeros(m.shape.rows, np.float32)
        shares[: len(m.rows)] = 1 / len(rows)
        y = np.zeros(m.shape.rows, np.float32)
        y[: len(m.rows)] = labels[m.rows]
        out.append((batches.pack_microbatch(rows, m), y, shares))
    return out


# --- loss and gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_tied", pytest.param("llama3_rope", marks=pytest.mark.slow)])
def test_loss_and_gradient_equal_torch(name, tmp_path):
    """transformers' AutoModelForSequenceClassification with BCEWithLogitsLoss, on the same rows, padded alike."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    import transformers

    config = dataclasses.replace(tiny_models.CASES[name], vocab_multiple=16)
    params = tiny_models.random_params(config, "score")
    rows, lengths, labels = random_rows(config)
    shapes = batches.choose_shapes(lengths, bucket=8, max_widths=3, token_budget=120, batch_size=11)
    accumulator = verifier_model.make_bce_accumulator(
        config, section(), optim.make_optimiser(OPT), one_device()
    )
    sums = accumulator.start(params)
    for piece in pieces(rows, lengths, labels, shapes):
        sums = accumulator.add(params, sums, piece)

    weight_export.save_pretrained(tmp_path / "model", config, params, "score", pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    valid = np.arange(40)[None] < lengths[:, None]
    ids = np.zeros((len(rows), 40), np.int64)
    ids[valid] = np.concatenate(rows)
    logits = model(torch.tensor(ids), attention_mask=torch.tensor(valid)).logits[:, 0]
    loss = torch.nn.BCEWithLogitsLoss()(logits, torch.tensor(labels, dtype=torch.float32))
    loss.backward()
    assert 0.1 < loss.item() < 10 and logits.std().item() > 0.1
    assert float(sums.loss) == pytest.approx(loss.item(), abs=1e-5)

    # Our gradients under Hugging Face's names, by the table that writes weights.
    weight_export.save_pretrained(
        tmp_path / "gradient", config, jax.device_get(sums.grads), "score", pad_token_id=0
    )
    ours = load_file(tmp_path / "gradient" / "model.safetensors")
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for n, gradient in theirs.items():
        np.testing.assert_allclose(ours[n], gradient, atol=1e-5, rtol=0, err_msg=n)
    for n in ("score.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert np.abs(theirs[n]).max() > 1e-3, n


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)],
    ids=["one device", "data 2 x fsdp 2 x tensor 2"],
)
def test_microbatches_of_many_widths_make_the_update_of_one_batch(sizes):
    config = tiny_models.config(vocab_size=30, width=16, head_dim=4, ffn=24)
    layout = Layout(mesh.make_mesh(*sizes, jax.devices()[: math.prod(sizes)]), RULES)
    specs = transformer.param_specs(config, head="score")
    opt, rows_multiple = optim.make_optimiser(OPT), layout.batch_shards
    params = tiny_models.random_params(config, "score")
    rows, lengths, labels = random_rows(config, n=12)
    shapes = batches.choose_shapes(
        lengths, bucket=8, max_widths=3, token_budget=80, batch_size=12, rows_multiple=rows_multiple
    )

    def put(tree):
        return layout.put(tree, "batch")

    def start():
        return optim.init_state(jax.device_put(params, mesh.make_shardings(layout, specs)), opt)

    valid = np.arange(40)[None] < lengths[:, None]
    tokens = np.zeros((12, 40), np.int32)
    tokens[valid] = np.concatenate(rows)
    update = verifier_model.make_bce_update(config, section(microbatch=12), opt, layout)
    whole = put((ScoreBatch(tokens, valid), labels.astype(np.float32), np.ones(12, np.float32)))
    expected, figures = update(start(), *whole)

    accumulator = verifier_model.make_bce_accumulator(config, section(), opt, layout)
    state = start()
    sums = accumulator.start(state.params)
    cut = pieces(rows, lengths, labels, shapes)
    used = {piece[0].tokens.shape for piece in cut}
    assert len(cut) > 2 and len({width for _, width in used}) > 1
    for piece in cut:
        sums = accumulator.add(state.params, sums, put(piece))
    state, got = accumulator.finish(state, sums)
    assert got.keys() == figures.keys()
    for name in got:
        assert float(got[name]) == pytest.approx(float(figures[name]), rel=1e-5, abs=1e-6), name
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert accumulator.add._cache_size() == len(used)  # a program a shape


# --- order and shapes ---------------------------------------------------------------------------------------


def test_an_epoch_has_every_row_once_in_an_order_of_seed_and_epoch():
    found = batches.order_batches(103, 10, 7, 2)
    assert [len(b) for b in found] == [10, 10, 10, 10] + [9] * 7  # 11 updates, none of a small remainder
    assert sorted(np.concatenate(found)) == list(range(103))
    for a, b in zip(found, batches.order_batches(103, 10, 7, 2), strict=True):
        np.testing.assert_array_equal(a, b)
    others = [np.concatenate(batches.order_batches(103, 10, *ids)) for ids in ((7, 1), (7, 3), (8, 2))]
    assert not any((np.concatenate(found) == other).all() for other in others)


def test_batches_are_cut_at_random_and_not_by_length():
    """Else an update would see rows of one length, and those of a batch would not stand for all."""
    lengths = np.arange(1000)
    means = [lengths[b].mean() for b in batches.order_batches(1000, 50, 0, 0)]
    assert np.abs(np.array(means) - 499.5).max() < 4 * 288.7 / 50**0.5


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_widths_pad_least(most):
    """Against all choices of widths."""
    lengths = np.random.default_rng(most).integers(1, 97, 60)
    shapes = batches.choose_shapes(
        lengths, bucket=16, max_widths=most, token_budget=256, batch_size=11, rows_multiple=2
    )
    widths = sorted({s.width for s in shapes})
    assert len(widths) <= most and not any(w % 16 for w in widths)
    assert widths[-1] == -(-lengths.max() // 16) * 16

    def cost(chosen):
        return sum(min(w for w in chosen if w >= length) for length in lengths)

    tried = [
        c
        for k in range(1, most + 1)
        for c in itertools.combinations(range(16, widths[-1] + 1, 16), k)
        if c[-1] == widths[-1]
    ]
    assert cost(widths) == min(map(cost, tried))
    # At 16 tokens 12 rows, the batch's, and not 16; at 96 tokens two, and half of that is not to be had.
    full = {w: min(max(256 // w // 2, 1) * 2, 12) for w in widths}
    half = {w: max(full[w] // 4, 1) * 2 for w in widths}
    assert [(s.rows, s.width) for s in shapes] == [
        (n, w) for w in widths for n in ([full[w], half[w]] if half[w] < full[w] else [full[w]])
    ]


def test_a_batch_is_cut_into_rectangles_that_hold_its_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 500, 2000)
    shapes = batches.choose_shapes(lengths, bucket=32, max_widths=6, token_budget=2048, batch_size=128)
    sorted_, unsorted = [], 0
    for rows in batches.order_batches(2000, 128, 0, 0):
        cut = batches.split_microbatches(rows, lengths, shapes)
        assert sorted(np.concatenate([m.rows for m in cut])) == sorted(rows)
        for m in cut:
            assert m.shape in shapes and lengths[m.rows].max() <= m.shape.width
            assert not any(s.width >= lengths[m.rows].max() for s in shapes if s.width < m.shape.width)
        sorted_ += cut
        unsorted += sum(lengths[rows[i : i + 4]].max() * 4 for i in range(0, len(rows), 4))
    real = lengths.sum()
    assert batches.compute_padding_share(sorted_, lengths) == pytest.approx(
        1 - real / sum(m.shape.tokens for m in sorted_)
    )
    assert batches.compute_padding_share(sorted_, lengths) < 0.2 < 1 - real / unsorted, (
        "rows of all lengths side by side"
    )


def test_a_cut_takes_the_fewest_tokens():
    """Against all sequences of rectangles that cover the sorted rows."""
    shapes = [batches.Shape(*s) for s in ((6, 8), (3, 8), (4, 16), (2, 16), (2, 32), (1, 32))]
    rng = np.random.default_rng(0)
    for n in (1, 3, 5, 7, 7, 7):
        lengths = rng.integers(1, 33, n)
        longest_first = sorted(lengths, reverse=True)

        def covers(sequence, longest_first=longest_first, n=n):
            i = 0
            for s in sequence:
                if i >= n or s.width < longest_first[i]:
                    return False
                i += s.rows
            return i >= n

        sequences = (c for k in range(1, 5) for c in itertools.product(shapes, repeat=k))
        least = min((sum(s.tokens for s in c) for c in sequences if covers(c)), default=None)
        cut = batches.split_microbatches(np.arange(n), lengths, shapes)
        assert len(cut) > 4 or sum(m.shape.tokens for m in cut) == least


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("rm"))


def kept(run_dir: Path) -> dict[str, bytes]:
    """What a run leaves of its best model."""
    names = ["predictions.jsonl", "report.json", *(f"best/{p.name}" for p in (run_dir / "best").iterdir())]
    return {name: (run_dir / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory) -> Path:
    """One uninterrupted run of 8 updates, which several tests look at."""
    path = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_layouts, "make_policy_layout", one_device)
        rm_loop.train_reward_model(run_config(place, path))
    return path


@pytest.mark.slow
def test_run_directory(finished, place):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows if "eval/auroc" in row] == [3, 6, 8]
    assert all(row["train_rm/rows"] == 16 and 0 <= row["train_rm/padding"] < 0.6 for row in rows)
    assert [row["train_rm/epoch"] for row in rows] == [n / 4 for n in range(1, 9)]
    assert rows[0]["train_rm/lr"] == pytest.approx(1.5e-3) and rows[7]["train_rm/lr"] == pytest.approx(
        3e-3 / 6
    )
    assert {"eval/odd/accuracy", "eval/even/ece", "time/tokens_per_second"} <= rows[2].keys()
    report = json.loads((finished / "report.json").read_text())
    best = max((row["eval/auroc"], -row["step"]) for row in rows if "eval/auroc" in row)
    assert (report["best"]["auroc"], -report["best"]["step"]) == best
    assert report["training_rows"] == 64 and report["groups"]["all"]["questions"] == 5
    assert {g: p["rows"] for g, p in report["groups"].items()} == {"all": 40, "even": 24, "odd": 16}
    accuracy = report["groups"]["all"]["figures"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    # The file of single rows carries the figures.
    said = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert [r["id"] for r in said] == [
        t.id for t in labelled_completions.load_labelled_completions(str(place / "dev.jsonl"))
    ]
    assert accuracy["value"] == np.mean([(r["logit"] > 0) == r["label"] for r in said])
    assert (finished / "reliability.png").read_bytes().startswith(b"\x89PNG")

    (shown,) = report_runs.encode(finished)["runs"]
    assert shown["kind"] == "reward_training" and shown["summary"]["done"] == 8
    assert [(name, group["rows"]) for name, group in shown["figures"]["groups"]] == [
        ("even", 24), ("odd", 16), ("all", 40)
    ]  # fmt: skip
    assert {"train_rm/loss", "eval/auroc", "eval/ece"} <= shown["series"]["curves"].keys()
    seen = seen_questions.read_record(finished / "best")
    assert seen.sources == {"even": 4, "odd": 4} and seen.complete and len(seen.fingerprints) == 8
    assert seen_questions.fingerprint_question("What is the answer 3?") in seen.fingerprints
    assert seen_questions.read_record(finished) == seen, "for models that are taken from checkpoints"


@pytest.fixture
def added(monkeypatch) -> list:
    """The microbatches that updates add up, as (ScoreBatch, labels, shares); no model is compiled or trained."""
    pieces = []

    def make(*_):
        def add(params, sums, piece):
            pieces.append(jax.device_get(piece))

        def finish(state, sums):
            return state, {"loss": jnp.zeros(()), "accuracy": jnp.zeros(())}

        return optim.Accumulator(start=lambda params: None, add=add, finish=finish)

    monkeypatch.setattr(verifier_model, "make_bce_accumulator", make)
    return pieces


def scripted(*margins):
    """Logits of the held-out rows at each evaluation in turn: on the right side of 0, by that margin."""
    left = iter(margins)

    def score(job, params, rows):
        return (next(left) * np.where(rows.labels > 0.5, 1, -1)).astype(np.float32)

    return score


def test_rows_weigh_alike_in_uneven_microbatches(place, tmp_path, alone, added, monkeypatch):
    """64 rows in two updates: each row has 1/32 of its update's loss, whatever its microbatch; padding has none."""
    monkeypatch.setattr(rm_loop, "score_rows", scripted(1.0))
    flags = dict(train_rm__epochs=1, train_rm__batch=32, train_rm__eval_every=0)
    rm_loop.train_reward_model(run_config(place, tmp_path, **flags))
    sizes = [int(batch.valid.any(1).sum()) for batch, _, _ in added]
    assert sum(sizes) == 64 and len(set(sizes)) > 1, "microbatches of several sizes"
    for batch, _, shares in added:
        np.testing.assert_array_equal(shares, np.where(batch.valid.any(1), np.float32(1 / 32), 0))


def test_the_model_of_the_least_loss_is_kept_where_loss_chooses(place, tmp_path, alone, added, monkeypatch):
    """Three evaluations, all of them right: log(1 + e^-margin) is the loss."""
    monkeypatch.setattr(rm_loop, "score_rows", scripted(1.0, 3.0, 2.0))
    flags = dict(train_rm__batch=64, train_rm__epochs=3, train_rm__eval_every=1, train_rm__keep_best="loss")
    rm_loop.train_reward_model(run_config(place, tmp_path, **flags))
    assert [row["eval/best"] for row in metrics(tmp_path)] == [1.0, 1.0, 0.0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["best"] == {"step": 2, "loss": pytest.approx(np.log1p(np.exp(-3.0)), abs=1e-6)}
    assert set(np.abs(held_out_logits(tmp_path))) == {3.0}


def noisy(*scales):
    """Logits at each evaluation in turn: 4 on the right side of 0, plus noise of that scale."""
    left = iter(scales)

    def score(job, params, rows):
        noise = next(left) * np.random.default_rng(0).normal(size=len(rows))
        return (4 * np.where(rows.labels > 0.5, 1, -1) + noise).astype(np.float32)

    return score


def test_the_best_model_has_the_calibration_of_its_held_out_logits(
    place, tmp_path, alone, added, monkeypatch
):
    monkeypatch.setattr(rm_loop, "score_rows", noisy(6.0))
    flags = dict(train_rm__epochs=1, train_rm__batch=64, train_rm__eval_every=0)
    rm_loop.train_reward_model(run_config(place, tmp_path, **flags))
    fitted = calibration.read_calibration(tmp_path / "best")
    triples = labelled_completions.load_labelled_completions(str(place / "dev.jsonl"))
    labels, questions = np.array([t.label for t in triples]), [t.question for t in triples]
    z = held_out_logits(tmp_path)
    assert fitted == calibration.fit_calibration(labels, z, questions) and fitted.rows == 40
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"] == dataclasses.asdict(fitted)
    # The figures after calibration are those of the cross-fit, of all rows and of a source.
    after = calibration.cross_fit_logits(labels, z, questions)
    for group, rows in (("all", np.full(40, True)), ("odd", np.array([t.source == "odd" for t in triples]))):
        figures = report["groups"][group]["figures"]
        assert figures["accuracy"]["value"] == np.mean((z > 0)[rows] == labels[rows])
        assert figures["calibrated_accuracy"]["value"] == np.mean((after > 0)[rows] == labels[rows])
        assert (
            figures["calibrated_ece"]["value"] == rm_report.compute_metrics(labels[rows], after[rows])["ece"]
        )
    # Two sums of the same numbers, which differ in the last digit on some machines.
    ece = report["groups"]["all"]["figures"]["calibrated_ece"]["value"]
    assert ece == pytest.approx(fitted.ece_cross_fitted, rel=1e-12)
    table = rm_report.format_report_table(report["groups"])
    assert "calibrated accuracy" in table and "calibrated ece" in table


def test_a_better_model_without_a_fit_keeps_no_calibration_of_the_last(
    place, tmp_path, alone, added, monkeypatch, capsys
):
    """The second evaluation separates the labels perfectly."""
    monkeypatch.setattr(rm_loop, "score_rows", noisy(6.0, 0.0))
    flags = dict(train_rm__epochs=2, train_rm__batch=64, train_rm__eval_every=1)
    rm_loop.train_reward_model(run_config(place, tmp_path, **flags))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["best"]["step"] == 2 and report["calibration"] is None
    assert not (tmp_path / "best" / calibration.CALIBRATION).exists()
    assert "calibrated_ece" not in report["groups"]["all"]["figures"]
    assert "warning: no calibration is stored with the weights: the logits of" in capsys.readouterr().out


# --- faults -------------------------------------------------------------------------------------------------


def change_updates(monkeypatch, change) -> None:
    """Let each update make `change(model before it)` of the model."""
    update = rm_loop._update

    def wrapped(job, state):
        before = jax.tree.map(jnp.copy, state.reward)
        state, row = update(job, state)
        return dataclasses.replace(state, reward=change(before)), row

    monkeypatch.setattr(rm_loop, "_update", wrapped)


@pytest.mark.slow
def test_a_training_whose_updates_are_all_skipped_is_a_fault(place, tmp_path, alone, monkeypatch):
    """Its best model would be the one that it began with."""
    change_updates(monkeypatch, lambda model: model.replace(skipped=model.skipped + 1))
    with pytest.raises(hosts.RunFault, match="all 8 updates were skipped"):
        rm_loop.train_reward_model(run_config(place, tmp_path))


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(place, tmp_path, alone, monkeypatch):
    change_updates(
        monkeypatch, lambda model: model.replace(params=jax.tree.map(lambda x: x * jnp.nan, model.params))
    )
    with pytest.raises(
        hosts.RunFault, match=r"update 2: .*reward\.params.* are not finite; this state is not saved"
    ):
        rm_loop.train_reward_model(run_config(place, tmp_path))
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_updates_whose_checkpoints_are_lost_are_not_dropped(place, tmp_path, alone):
    """Rows that only a training with a checkpoint can have."""
    row = {"step": 5, "train_rm/loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SetupError, match="reaches step 5, but no checkpoint is left"):
        rm_loop.train_reward_model(run_config(place, tmp_path))
    assert not (tmp_path / "config.json").exists()


# --- a run that stops ---------------------------------------------------------------------------------------


def stop_in(patch, name: str, call: int, look: int) -> None:
    """As if a SIGTERM had come before this `look` of this call of a function of the loop."""
    inner, calls = getattr(rm_loop, name), itertools.count(1)

    def wrapped(*args):
        if next(calls) != call:
            return inner(*args)
        looks = itertools.count(1)

        def looked():
            if next(looks) == look:
                raise hosts.Stopped

        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(hosts, "raise_if_stopping", looked)
            return inner(*args)

    patch.setattr(rm_loop, name, wrapped)


@pytest.mark.parametrize(
    "name, call, look, lines, saved",
    [
        pytest.param("_update", 1, 1, 0, 0, marks=pytest.mark.slow),
        ("_update", 6, 2, 5, 5),
        pytest.param("score_rows", 1, 3, 2, 3, marks=pytest.mark.slow),
        # where a checkpoint is due as well
        pytest.param("score_rows", 2, 1, 5, 6, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    name, call, look, lines, saved, finished, place, tmp_path, monkeypatch, alone
):
    """Metrics, the best model's weights and its logits."""
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in(patch, name, call, look)
        with pytest.raises(hosts.Stopped):
            rm_loop.train_reward_model(run_config(place, path))
    log = path / "metrics.jsonl"
    assert (log.read_text().count("\n") if log.exists() else 0) == lines
    assert max(int(p.name) for p in (path / "checkpoints").iterdir()) == saved
    rm_loop.train_reward_model(run_config(place, path))
    assert timeless(metrics(path)) == timeless(metrics(finished))
    assert kept(path) == kept(finished)


def test_a_run_that_is_done_reports_again(finished, place, alone):
    before = kept(finished), (finished / "metrics.jsonl").read_bytes()
    rm_loop.train_reward_model(run_config(place, finished))
    assert (kept(finished), (finished / "metrics.jsonl").read_bytes()) == before


@pytest.mark.slow
def test_what_a_killed_run_did_after_its_checkpoint_is_done_again(
    finished, place, tmp_path, monkeypatch, alone
):
    path, evaluate = tmp_path / "run", rm_loop._evaluate

    def evaluate_and_die(job, state):
        evaluate(job, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # After best/ was written, before the line of update 3.
        patch.setattr(rm_loop, "_evaluate", evaluate_and_die)
        with pytest.raises(KeyboardInterrupt):
            rm_loop.train_reward_model(run_config(place, path))
    assert (path / "best").is_dir() and len(metrics(path)) == 2
    rm_loop.train_reward_model(run_config(place, path))
    assert timeless(metrics(path)) == timeless(metrics(finished)) and kept(path) == kept(finished)


def test_the_best_model_never_lies_there_without_its_record(place, tmp_path, monkeypatch):
    """Killed before the record is written, there is nothing yet, or the whole one of before."""
    model = loading.load_model(
        run_config(place, tmp_path).reward, "reward", "score", one_device(), tmp_path, 0
    )
    data = load_examples(place)
    cfg = run_config(place, tmp_path)
    job = types.SimpleNamespace(cfg=cfg, data=data, head_trained=False, model=model[0])
    folder = tmp_path / "best"

    def die(*_):
        raise KeyboardInterrupt

    def save(killed=False):
        with monkeypatch.context() as patch:
            if killed:
                patch.setattr(seen_questions, "write_record", die)
            best_model.export_best_model(job, model[1], folder)

    with pytest.raises(KeyboardInterrupt):
        save(killed=True)
    assert not folder.exists()
    save()
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert seen_questions.SEEN in whole and "model.safetensors" in whole
    with pytest.raises(KeyboardInterrupt):
        save(killed=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    save()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data_or_settings(finished, place, tmp_path, alone):
    with pytest.raises(SetupError, match="train_rm.batch was 16 and is now 8"):
        rm_loop.train_reward_model(run_config(place, finished, train_rm__batch=8))
    path = tmp_path / "run"
    data = write_task(tmp_path / "data.jsonl", range(1, 9))
    flags = dict(train_rm__data=str(data), train_rm__epochs=1)
    rm_loop.train_reward_model(run_config(place, path, **flags))
    write_task(data, range(1, 9), seed=1)  # as many rows under the same name
    with pytest.raises(SetupError, match="was saved with another data"):
        rm_loop.train_reward_model(run_config(place, path, **flags))


@pytest.mark.slow
def test_patience_ends_a_run_that_gets_no_better(place, tmp_path, alone):
    path = tmp_path / "run"
    flags = dict(train_rm__eval_every=1, train_rm__patience=2, train_rm__optimiser__lr=0.0)
    rm_loop.train_reward_model(run_config(place, path, **flags))
    assert [row["eval/best"] for row in metrics(path)] == [1.0, 0.0, 0.0]  # the same figure is no better
    rm_loop.train_reward_model(run_config(place, path, **flags))
    assert len(metrics(path)) == 3
    assert json.loads((path / "report.json").read_text())["best"]["step"] == 1


# --- what it learns, and what becomes of it -----------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_whether_the_answer_is_the_reference(place, tmp_path, alone):
    """On questions that it has not seen."""
    data = (
        write_task(tmp_path / "train.jsonl", range(1, 65)),
        write_task(tmp_path / "dev.jsonl", range(100, 116)),
    )
    flags = dict(train_rm__data=str(data[0]), train_rm__eval_data=str(data[1]), train_rm__epochs=9)
    flags |= dict(train_rm__batch=32, train_rm__eval_every=0, checkpoint__every=1000, reward__microbatch=32)
    rm_loop.train_reward_model(run_config(place, tmp_path / "run", **flags))
    best = json.loads((tmp_path / "run/report.json").read_text())["groups"]["all"]["figures"]
    assert best["accuracy"]["value"] > 0.95 and best["auroc"]["value"] > 0.95


def held_out_logits(run_dir: Path) -> np.ndarray:
    return np.array(
        [json.loads(line)["logit"] for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    )


def test_the_best_model_loads_in_transformers(finished, place):
    torch = pytest.importorskip("torch")
    import transformers

    best, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        finished / "best", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "best")
    theirs = []
    for t in labelled_completions.load_labelled_completions(str(place / "dev.jsonl")):
        text = prompts.render_verifier_text(t.question, t.reference, t.completion)
        with torch.no_grad():
            theirs.append(best.eval()(**tokenizer(text, return_tensors="pt")).logits.item())
    assert np.std(theirs) > 1e-3
    np.testing.assert_allclose(held_out_logits(finished), theirs, atol=1e-4)


def test_the_best_model_is_a_reward_model_of_a_run(finished, place, tmp_path):
    """`launch/train.py` builds its reward model from it, as trained, and it gives the same logits."""
    cfg = base.get_config()
    cfg.reward.weights = str(finished / "best")
    cfg.reward.max_tokens = 96
    cfg.data.format = "synthetic"  # no file of problems is needed
    bundle, state = build_reward_bundle(RunSettings.from_config(cfg), one_device(), tmp_path)
    rows = [
        prompts.encode_verifier_input(bundle.model.tokenizer, t.question, t.reference, t.completion, 96)
        for t in labelled_completions.load_labelled_completions(str(place / "dev.jsonl"))
    ]
    (m,) = batches.split_microbatches(
        np.arange(len(rows)), np.array([len(r) for r in rows]), [batches.Shape(len(rows), 96)]
    )
    z = bundle.compute_logits(state.params, batches.pack_microbatch(rows, m))
    np.testing.assert_allclose(z, held_out_logits(finished)[m.rows], atol=1e-5)


@pytest.mark.slow
def test_a_model_that_goes_on_learning_remembers_what_it_saw_before(finished, place, tmp_path, alone):
    more = write_task(tmp_path / "more.jsonl", range(50, 54), source="more")
    flags = dict(reward__weights=str(finished / "best"), train_rm__data=str(more), train_rm__epochs=1)
    rm_loop.train_reward_model(run_config(place, tmp_path / "run", **flags))
    seen = seen_questions.read_record(tmp_path / "run/best")
    assert seen.sources == {"even": 4, "odd": 4, "more": 4} and len(seen.fingerprints) == 12 and seen.complete
    # What the weights saw before is as little held out as what they see now.
    before = flags | dict(train_rm__eval_data=str(place / "train.jsonl"))
    with pytest.raises(SetupError, match="initial weights were trained on"):
        rm_loop.train_reward_model(run_config(place, tmp_path / "run3", **before))
    (tmp_path / "other").mkdir()
    for file in (finished / "best").iterdir():
        if file.name != seen_questions.SEEN:
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    rm_loop.train_reward_model(
        run_config(place, tmp_path / "run2", **flags | dict(reward__weights=str(tmp_path / "other")))
    )
    assert not seen_questions.read_record(tmp_path / "run2/best").complete


@pytest.mark.slow
def test_a_run_in_a_bucket_leaves_the_same(bucket, finished, place, alone):  # noqa: F811
    rm_loop.train_reward_model(run_config(place, "gs://b/run"))
    path = Bucket.disk("b/run")
    assert timeless(metrics(path)) == timeless(metrics(finished)) and kept(path) == kept(finished)
    assert seen_questions.read_record("gs://b/run/best") == seen_questions.read_record(finished / "best")
    assert weights.load_weights("gs://b/run/best", head="score", layout=one_device()).head_trained


# --- reports ---------------------------------------------------------------------------------------------


def test_figures_by_hand():
    # Of scores .75, .75, .25, .25 two are right; a pair of labels is ordered rightly, wrongly, and twice tied.
    z = np.array([1, 1, -1, -1]) * np.log(3)
    found = rm_report.compute_metrics(np.array([1, 0, 1, 0]), z)
    assert found["loss"] == pytest.approx(-(np.log(0.75) + np.log(0.25)) / 2)
    for name in ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc", "mean_score"):
        assert found[name] == pytest.approx(0.5), name
    assert found["ece"] == pytest.approx(0.25)
    np.testing.assert_allclose(rm_report.to_probabilities(np.array([-800.0, 0.0, 800.0])), [0.0, 0.5, 1.0])


def test_a_report_is_resampled_by_question():
    """All rows of one question are scored rightly, all of another wrongly: two draws, not twenty."""
    triples = tuple(Triple(q, "1", "1", float(i % 2)) for q in ("a", "b") for i in range(10))
    part = examples.Examples(triples, ((1,),) * 20, 0)
    logits = np.where(part.labels > 0.5, 1.0, -1.0) * np.repeat([1.0, -1.0], 10)
    found = rm_report.make_report(part, logits, seed=0, resamples=200)["all"]
    assert (found["rows"], found["questions"], found["positives"]) == (20, 2, 10)
    for name in rm_report.WITH_INTERVALS:
        assert found["figures"][name] == {"value": 0.5, "low": 0.0, "high": 1.0}, name


# --- bad input: one clear message ---------------------------------------------------------------------------

BAD = [
    (dict(train_rm__data=""), "train_rm.data is empty"),
    (dict(train_rm__data="nowhere.jsonl"), "nowhere.jsonl"),
    (dict(train_rm__data=" , "), "train_rm.data is empty"),
    (dict(train_rm__eval_data="EMPTY"), "the file has no rows"),
    (dict(train_rm__eval_data="ALL_RIGHT"), "held-out rows all have the label 1: both labels must occur"),
    (dict(train_rm__data="ALL_RIGHT"), "training rows all have the label 1"),
    (dict(train_rm__data="TORN"), "torn.jsonl:2"),
    (dict(train_rm__eval_data="TRAIN"), "all of its 64 rows have a question that is in the training data"),
    (dict(train_rm__max_characters=20), "all of the 64 training texts are longer"),
    (dict(reward__max_tokens=20), "row 1/0: the reward model's input has"),
    (
        dict(train_rm__eval_data="", train_rm__eval_share=0.99),
        "leaves nothing to train on, or nothing held out",
    ),
    (dict(train_rm__eval_share=1.0), "train_rm.eval_share=1.0"),
    (dict(train_rm__batch=0), "train_rm.batch=0: it must be at least 1"),
    (dict(reward__packing="on"), "reward.packing=on: this job groups rows by their length"),
    (dict(train_rm__keep_best="f1"), "train_rm.keep_best='f1': it is one of auroc, accuracy, loss"),
    (
        dict(train_rm__optimiser__decay="step"),
        "train_rm.optimiser.decay='step': it is one of constant, linear, cosine",
    ),
    (dict(train_rm__optimiser__lr=-1.0), "train_rm.optimiser.lr=-1.0"),
    (dict(reward__weights=""), "reward.weights is empty"),
    (dict(reward__dtype="float16"), "reward.dtype='float16'"),
    (dict(mesh__reward="1x1x1"), "mesh.reward='1x1x1'"),
]


@pytest.mark.parametrize("changes, words", BAD, ids=[words[:40] for _, words in BAD])
def test_bad_input_is_refused(changes, words, place, tmp_path, alone):
    right = write_task(tmp_path / "right.jsonl", range(60, 64), label=1)
    torn, empty = tmp_path / "torn.jsonl", tmp_path / "empty.jsonl"
    torn.write_text(right.read_text().splitlines()[0] + '\n{"question": "1 + 1?"\n')
    empty.write_text("")
    files = {"ALL_RIGHT": right, "TORN": torn, "EMPTY": empty, "TRAIN": place / "train.jsonl"}
    changes = {k: str(files[v]) if v in files else v for k, v in changes.items()}
    with pytest.raises(SetupError) as refused:
        rm_loop.train_reward_model(run_config(place, tmp_path / "run", **changes))
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_weights_that_overflow_are_said(place, tmp_path, alone):
    broken = tmp_path / "broken"
    config = tiny_models.config(
        vocab_size=tokenizers.load_tokenizer_from(str(place / "tokenizer")).vocab_size,
        width=32,
        head_dim=8,
        ffn=64,
    )
    params = tiny_models.random_params(config, "score")
    # Each weight is finite, as a checkpoint's have to be, and their products are not.
    params["score"] = jnp.full_like(params["score"], 3e38)
    weight_export.save_pretrained(
        broken, config, params, "score", tokenizer_dir=place / "tokenizer", pad_token_id=0
    )
    with pytest.raises(SetupError, match="update 3: 40 of 40 held-out logits are not finite: lower"):
        rm_loop.train_reward_model(run_config(place, tmp_path / "run", reward__weights=str(broken)))


# --- as a user starts it ------------------------------------------------------------------------------------


def command(place: Path, run_dir: Path, *more: str) -> list[str]:
    tiny, default = run_config(place, run_dir), base.get_config()

    def flat(c, prefix=""):
        for name, value in c.items():
            yield from (
                flat(value, f"{prefix}{name}.") if hasattr(value, "items") else [(prefix + name, value)]
            )

    changed = [(name, v) for (name, v), (_, d) in zip(flat(tiny), flat(default), strict=True) if v != d]
    return [
        sys.executable,
        str(ROOT / "launch/train_rm.py"),
        f"--config={ROOT}/configs/base.py",
        *(f"--config.{name}={value}" for name, value in changed),
        *more,
    ]


def test_the_command_refuses_in_one_line(place, tmp_path):
    wrong = command(place, tmp_path / "r", "--config.train_rm.keep_best=f1")
    done = subprocess.run(wrong, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: train_rm.keep_best='f1'"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_signal_and_the_same_command_again(finished, place, tmp_path):
    """SIGTERM: exit code 75 with a checkpoint; SIGKILL; then the end, equal to the whole."""
    path = tmp_path / "run"
    for sent, code, lines in ((signal.SIGTERM, 75, 2), (signal.SIGKILL, -9, 5)):
        process = subprocess.Popen(command(place, path), env=environment(), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        log = path / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= lines:
                break
            time.sleep(0.005)
        process.send_signal(sent)
        assert process.wait(300) in (code, 0)
    done = subprocess.run(
        command(place, path), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "balanced accuracy" in done.stdout and f"{path}: 8 updates done" in done.stdout
    assert [row["step"] for row in metrics(path)] == list(range(1, 9))
    # The same machine, but another process with one device of its own: equal to the last bits of a sum.
    for ours, whole in zip(metrics(path), metrics(finished), strict=True):
        assert ours["train_rm/loss"] == pytest.approx(whole["train_rm/loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_of_two_devices_train_what_one_does(finished, place, tmp_path):
    """Each reads and holds its part; the first alone writes, weights that lie on both included."""
    path = tmp_path / "run"
    argv = command(place, path)[1:]
    program = f"import runpy, sys; sys.argv = {argv!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    processes = start_hosts(path, 2, 2, tmp_path / "out", program)
    try:
        assert [p.wait(300) for p in processes] == [0, 0], (tmp_path / "out/0").read_text()[-2000:]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    for two, one in zip(metrics(path), metrics(finished), strict=True):
        for name in ("train_rm/loss", "train_rm/grad_norm", "eval/loss"):
            assert two.get(name) == (pytest.approx(one[name], rel=1e-3) if name in one else None), name
    np.testing.assert_allclose(held_out_logits(path), held_out_logits(finished), atol=1e-2)
    ours, theirs = (
        weights.load_weights(str(p / "best"), head="score", layout=one_device()).params
        for p in (path, finished)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), ours, theirs)
    assert "train_rm" not in (tmp_path / "out/1").read_text()
