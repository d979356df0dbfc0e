"""Problems of a run: the same from every kind of file, pinned, recorded, and described in one line a source."""

import json

import pytest
from test_data_runs import encode_lines, encode_parquet, make_rows
from test_data_sources import fill, hub  # noqa: F401 (a fixture)
from tiny_hub import COMMIT, make_card, make_hub_cache

from cooper_jax.configs import base
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import run_problems
from cooper_jax.trainer.run_problems import EncodedProblems
from cooper_jax.trainer.run_settings import RunSettings


def read_settings(**changes) -> RunSettings:
    cfg = base.get_config()
    cfg.data.update(changes)
    return RunSettings.from_config(cfg)


def load(run_dir=None, **changes):
    return run_problems.load_problems(read_settings(**changes), run_dir)


def fill_hub(hub, rows):  # noqa: F811
    files = {
        "README.md": make_card(("main", ("train",)), ("other", ("train",))),
        "main/train-00000-of-00002.parquet": encode_parquet(rows[:4]),
        "main/train-00001-of-00002.parquet": encode_parquet(rows[4:]),
    }
    make_hub_cache(hub, "owner/sums", files)


def test_every_kind_of_file_gives_the_same_problems(tmp_path, hub):  # noqa: F811
    """But for their ids; tests/test_data_runs.py compares whole runs."""
    rows = make_rows("train", 9)
    text = "question,answer\n" + "".join(f'"{r["question"]}","{r["answer"]}"\n' for r in rows)
    fill(
        tmp_path,
        {
            "train.jsonl": encode_lines(rows),
            "train.json": json.dumps(rows, indent=1).encode(),
            "train.csv": text.encode(),
            "shards/part-0.parquet": encode_parquet(rows[:4]),
            "shards/part-1.parquet": encode_parquet(rows[4:]),
        },
    )
    fill_hub(hub, rows)

    def read(train):
        found = load(train=train, eval_from_train=2)
        return [[(p.question, p.reference) for p in part] for part in (found.train, found.held_out)]

    lines = read("train.jsonl")
    assert [len(part) for part in lines] == [7, 2]
    for source in ("train.json", "train.csv", "shards", "shards/part-?.parquet", "owner/sums:main"):
        assert read(source) == lines
    assert read("shards/part-0.parquet, x=shards/part-1.parquet") == lines


def test_a_run_that_resumes_reads_the_recorded_commit(tmp_path, hub):  # noqa: F811
    fill_hub(hub, make_rows("train", 9))
    run_dir = tmp_path / "run"
    first = load(run_dir, train="owner/sums:main")
    run_problems.record_sources(first, run_dir)
    record = json.loads((run_dir / "data.json").read_text())
    assert record["data.train"][0] == {
        "source": "owner/sums:main",
        "name": "sums",
        "commit": COMMIT,
        "files": [f"owner/sums@{COMMIT[:8]}/main/train-0000{i}-of-00002.parquet" for i in (0, 1)],
        "rows": 9,
        "problems": 9,
    }

    # The main branch moves.  A new run reads the new commit, one with a checkpoint the recorded one.
    make_hub_cache(hub, "owner/sums", {"train.jsonl": encode_lines(make_rows("train", 2))}, "f" * 40)
    assert len(load(run_dir, train="owner/sums").train) == 2
    (run_dir / "checkpoints" / "0").mkdir(parents=True)
    assert load(run_dir, train="owner/sums:main").train == first.train
    (run_dir / "data.json").write_text("{")
    with pytest.raises(SetupError, match="data: .*data.json is damaged.*another --config.run_dir"):
        load(run_dir, train="owner/sums:main")


def test_all_sources_that_cannot_be_read_are_named_at_once(tmp_path, hub):  # noqa: F811
    fill(tmp_path, {"a.jsonl": encode_lines(make_rows("train", 2)), "b/a.jsonl": b'{"x": 1}\n'})
    with pytest.raises(SetupError) as error:
        load(train="a.jsonl,none.jsonl", eval="b/a.jsonl")
    none, malformed = error.value.messages
    assert none.startswith("data.train=none.jsonl: none.jsonl: there is no such file")
    assert malformed.startswith("data.eval=b/a.jsonl: b/a.jsonl:1: the fields ['x'] fit no known format")
    with pytest.raises(SetupError, match="data.train: two sources are called 'a'"):
        load(train="a.jsonl,a.jsonl")


def test_each_source_is_described_in_one_line(tmp_path, hub):  # noqa: F811
    rows = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(["1", "2", "proof", "4"])]
    kinds = {"problem_type": "", "question_type": ""}
    numina = [{"problem": "P", "answer": "proof", **kinds}, {"problem": "Q", "answer": "5", **kinds}]
    fill(tmp_path, {"a.jsonl": encode_lines([*rows, rows[0]]), "b.jsonl": encode_lines(numina)})

    def describe(too_long, **changes):
        found = load(train="a.jsonl,numina=b.jsonl", **changes)
        kept = [p for p in found.train if p.question not in too_long]
        encoded = EncodedProblems(kept, [], {"a": len(found.train) - len(kept)})
        return run_problems.describe_sources(found, encoded, EncodedProblems([], [], {}), 7)

    assert describe(["1?"]) == [
        "data.train=a.jsonl: 5 rows, 1 dropped: prompts longer than 7 tokens; 4 used, 1 duplicates of others, "
        "1 references that the rule can never verify ('proof')",
        "data.train=numina=b.jsonl: 2 rows, 1 dropped: no final answer; 1 used, 0 duplicates of others, "
        "0 references that the rule can never verify",
    ]
    assert describe([], drop_duplicates=True)[0].startswith(
        "data.train=a.jsonl: 5 rows, 1 dropped: duplicates; 4 used, 0 duplicates of others, "
    )


def test_a_weighted_source_without_a_problem_is_refused(tmp_path, hub):  # noqa: F811
    fill(tmp_path, {f"{n}.jsonl": encode_lines(make_rows("train", 3)) for n in "ab"})
    settings = read_settings(train="a.jsonl,b.jsonl", train_weights="1,3")
    train = run_problems.load_problems(settings).train
    assert run_problems.make_data_order(settings.data, train).sizes == (3, 3)
    with pytest.raises(SetupError, match="only a have problems left to train on, .* weights for 2 sources"):
        run_problems.make_data_order(settings.data, train[:3])
