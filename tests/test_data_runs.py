"""Runs on data in several forms: equal to the bit, and resumed on the same data."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_steps
from test_data_sources import fill, hub  # noqa: F401 (a fixture)
from tiny_hub import COMMIT, make_card, make_hub_cache
from tiny_runs import metrics, parameters, timeless

from cooper_jax.data import synthetic
from cooper_jax.trainer.train_loop import train

SMALL = {
    "steps": 1,
    "data.format": "auto",
    "reward.arm": "model",
    "eval.every": 1,
    "eval.problems": 4,
    "checkpoint.every": 1,
    "checkpoint.keep": 0,
    "log.samples_every": 1,
    "log.samples": 3,
    "log.to": "",
    "mesh.data": 1,
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    import jax

    found = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: found)


def run(path, **changes):
    """Train, and return (metrics without times, samples without ids, the policy's parameters)."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    cfg = tiny_steps.config(**SMALL | {"run_dir": str(path)} | changes)
    train(cfg)
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    return (
        timeless(metrics(path)),
        [{k: v for k, v in sample.items() if k != "id"} for sample in samples],
        parameters(path, cfg.steps, "policy"),
    )


def make_rows(split, count):
    return [{"question": p.question, "answer": p.reference} for p in synthetic.make_problems(0, count, split)]


def encode_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def encode_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def assert_equal(found, expected):
    np.testing.assert_equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert found[2].tobytes() == expected[2].tobytes()


@pytest.mark.slow
def test_one_run_from_every_kind_of_file(tmp_path, hub, capsys):  # noqa: F811
    """JSON lines, a JSON list, a folder of parquet shards, a hub data set whose branch moves before a resume."""
    rows, held_out = make_rows("train", 11), make_rows("eval", 6)
    fill(
        tmp_path,
        {
            "train.jsonl": encode_lines(rows),
            "test.jsonl": encode_lines(held_out),
            "train.json": json.dumps(rows, indent=1).encode(),
            "shards/part-0.parquet": encode_parquet(rows[:4]),
            "shards/part-1.parquet": encode_parquet(rows[4:]),
        },
    )
    lines = run(tmp_path / "lines", data__train="train.jsonl", data__eval="test.jsonl")
    assert len(lines[0]) == 2 and len(lines[1]) == 3
    said = capsys.readouterr().out
    assert "data.train=train.jsonl: 11 rows; 11 used, 0 duplicates of others, " in said
    assert "data.eval=test.jsonl: 6 rows; 4 used, " in said
    for name, source in (("list", "train.json"), ("folder", "shards")):
        assert_equal(run(tmp_path / name, data__train=source, data__eval="test.jsonl"), lines)

    files = {
        "README.md": make_card(("main", ("train", "test")), ("other", ("train",))),
        "main/train-00000-of-00002.parquet": encode_parquet(rows[:4]),
        "main/train-00001-of-00002.parquet": encode_parquet(rows[4:]),
        "main/test-00000-of-00001.parquet": encode_parquet(held_out),
    }
    make_hub_cache(hub, "owner/sums", files)
    sources = dict(data__train="owner/sums:main", data__eval="held_out=owner/sums:main")
    assert_equal(run(tmp_path / "from_hub", **sources), lines)
    assert f"data.train=owner/sums:main: 11 rows at commit {COMMIT[:8]}; 11 used" in capsys.readouterr().out
    record = json.loads((tmp_path / "from_hub" / "data.json").read_text())
    assert record["data.eval"] == [
        {
            "source": "held_out=owner/sums:main",
            "name": "held_out",
            "commit": COMMIT,
            "files": [f"owner/sums@{COMMIT[:8]}/main/test-00000-of-00001.parquet"],
            "rows": 6,
            "problems": 6,
        }
    ]

    # The run resumes on its recorded commit, not on the branch's new one.
    make_hub_cache(hub, "owner/sums", {"train.jsonl": encode_lines(rows[:2])}, "f" * 40)
    resumed = run(tmp_path / "from_hub", **sources, steps=2)
    assert_equal(
        resumed, run(tmp_path / "lines", data__train="train.jsonl", data__eval="test.jsonl", steps=2)
    )


@pytest.mark.slow
def test_a_mixture_resumes_and_is_evaluated_by_source(tmp_path, hub):  # noqa: F811
    rows, held_out = make_rows("train", 12), make_rows("eval", 8)
    fill(
        tmp_path,
        {
            "a.jsonl": encode_lines(rows[:4]),
            "b.jsonl": encode_lines(rows[4:]),
            "x.jsonl": encode_lines(held_out[:4]),
            "y.jsonl": encode_lines(held_out[4:]),
        },
    )
    sources = dict(
        data__train="a.jsonl,b.jsonl",
        data__train_weights="2,1",
        data__eval="x.jsonl,last=y.jsonl",
        data__eval_weights="3,1",
        # A tokenizer of so few problems has short pieces.
        data__max_prompt_tokens=64,
    )
    whole = run(tmp_path / "whole", **sources, steps=2)
    run(tmp_path / "parts", **sources)
    assert_equal(run(tmp_path / "parts", **sources, steps=2), whole)

    # The data order has two problems of `a` for each of `b`; a step has three.
    of_a = {row["question"] for row in rows[:4]}
    assert tiny_steps.B == 3 and {s["step"] for s in whole[1]} == {1, 2}
    for step in (1, 2):
        assert sum(s["question"] in of_a for s in whole[1] if s["step"] == step) == 2
    last = whole[0][-1]
    assert last["eval/problems"] == 4
    both = [last[f"eval/by_source/{name}/response/tokens_mean"] for name in ("x", "last")]
    assert last["eval/response/tokens_mean"] == pytest.approx((3 * both[0] + both[1]) / 4)
    assert "eval/by_source/last/rm/mean" in last

    # In one set with equal weights of rows, nothing but the names differs.
    del sources["data__train_weights"], sources["data__eval_weights"]
    fill(tmp_path, {"all.jsonl": encode_lines(rows), "xy.jsonl": encode_lines(held_out)})
    joined = run(tmp_path / "joined", **sources)
    one = run(tmp_path / "one", data__train="all.jsonl", data__eval="xy.jsonl")
    kept = [{k: v for k, v in row.items() if "by_source" not in k} for row in joined[0]]
    assert_equal((kept, *joined[1:]), one)
