"""The scripts of docs/python_api.md: each runs, is short, and is what the page shows."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_directories
import tiny_runs

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("score_answers", "sample_answers", "train_from_python")


def load_example(name: str):
    """The module of examples/`name`.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_shown_as_it_stands(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 50
    assert f"```python\n{text}```" in (ROOT / "docs" / "python_api.md").read_text()


def test_score_answers(tmp_path, monkeypatch, capsys):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    tiny_directories.write_model(tmp_path, "score")
    scores = load_example("score_answers").main(str(tmp_path / "hf"))
    assert scores.shape == (2,) and ((0 < scores) & (scores < 1)).all()
    assert "20 apples. The answer is 20." in capsys.readouterr().out


def test_sample_answers(tmp_path, monkeypatch, capsys):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    tiny_directories.write_model(tmp_path, "logits")
    samples = load_example("sample_answers").main(str(tmp_path / "hf"), max_new_tokens=6)
    assert len(samples) == 2 and all(np.isfinite(sample.logprobs).all() for sample in samples)
    assert capsys.readouterr().out.count("log-probability") == 2


@pytest.mark.slow
def test_train_from_python(tmp_path):
    """Its own process, with one device; a second start finds the run complete and gives the same result."""
    small = tiny_runs.SMALL | {
        "steps": 1,
        "supervised.policy_steps": 5,
        "eval.every": 0,
        "checkpoint.every": 1,
    }
    program = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('example', sys.argv[1])\n"
        "example = importlib.util.module_from_spec(spec); spec.loader.exec_module(example)\n"
        "result = example.main(json.loads(sys.argv[2]))\n"
        "print(json.dumps(result.metrics))\n"
    )
    settings = json.dumps(small | {"run_dir": str(tmp_path / "run")})
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, str(ROOT / "examples/train_from_python.py"), settings],
            env=tiny_runs.environment() | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(done.stdout.splitlines())
    first, again = outputs
    assert json.loads(first[-1]) == json.loads(again[-1]) == tiny_runs.metrics(tmp_path / "run")
    answers = [line for line in first if line.startswith("  0.") or line.startswith("  1.")]
    assert len(answers) == 4 and answers == [line for line in again if line.startswith(("  0.", "  1."))]
    assert "complete steps already" in "\n".join(again)
