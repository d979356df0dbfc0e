"""The Python API: imports that cost nothing, scores and samples that equal the models' own, runs from a script."""

import functools
import json
import linecache
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_directories
import tiny_models
import tiny_runs

import cooper_jax
from cooper_jax.api import training, user_objects
from cooper_jax.api.named_models import choose_model
from cooper_jax.configs import base, tiny
from cooper_jax.data import prompts
from cooper_jax.model import transformer
from cooper_jax.model.tokenizer import load_tokenizer_from
from cooper_jax.reward import calibration
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.user_code import load_object, read_user_code
from cooper_jax.trainer.recipes import RECIPES
from cooper_jax.trainer.setup import read_settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The models of this file have one device, as on most machines of those who use the API."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


# --- the package -----------------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_library():
    """Nor do its names: a program that only asks for them waits for nothing."""
    program = (
        "import sys, time; start = time.process_time(); import cooper_jax; dir(cooper_jax)\n"
        "seconds = time.process_time() - start\n"
        "libraries = ('jax', 'flax', 'numpy', 'transformers', 'sklearn', 'ml_collections', 'torch')\n"
        "print([name for name in libraries if name in sys.modules], seconds < 0.5)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[] True\n", done.stdout + done.stderr


@pytest.mark.slow
def test_loading_a_model_imports_no_scikit_learn():
    """It takes seconds, and only evaluations need it."""
    program = (
        "import sys, cooper_jax; cooper_jax.VerifyRM, cooper_jax.Sampler, cooper_jax.train\n"
        "print('sklearn' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=tiny_runs.environment(), capture_output=True, text=True
    )
    assert done.stdout == "False False\n", done.stdout + done.stderr


def test_public_names_are_there_and_others_are_not():
    for name in cooper_jax.__all__:
        assert getattr(cooper_jax, name).__name__ == name and name in dir(cooper_jax)
    with pytest.raises(AttributeError, match="has no attribute 'VerifyRN'"):
        cooper_jax.VerifyRN  # noqa: B018


WIDTH = 256  # tokens to which `run_model` pads, so that all calls share one program


@functools.partial(jax.jit, static_argnums=0)
def compute_hidden(config, params, tokens, valid):
    layout = tiny_models.one_device()
    return transformer.hidden_states(params, config, tokens, valid, dtype=jnp.float32, layout=layout)


def run_model(config, params, ids: list[int]) -> jax.Array:
    """The hidden states [1, WIDTH, D] of a text alone."""
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, : len(ids)] = ids
    return compute_hidden(config, params, tokens, np.arange(WIDTH)[None, :] < len(ids))


# --- VerifyRM --------------------------------------------------------------------------------------------------

QUESTIONS = ["What is 3 plus 10?", "What is 4 plus 11?", "What is 3 plus 10?"]
REFERENCES = ["13", "15", "13"]
COMPLETIONS = ["The answer is 13.", "The answer is 16, so we put it within \\boxed{16}.", "14"]


@pytest.fixture(scope="module")
def reward_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifyrm")
    return folder / "hf", *tiny_directories.write_model(folder, "score")


def compute_logit(reward_directory, *texts: str) -> float:
    """The logit of one question, reference and completion, in a batch of its own."""
    directory, config, params = reward_directory
    ids = prompts.encode_verifier_input(load_tokenizer_from(str(directory)), *texts, 2048)
    valid = jnp.arange(WIDTH)[None, :] < len(ids)
    return float(transformer.score_last_token(params, config, run_model(config, params, ids), valid)[0])


def test_scores_are_the_models_probabilities(reward_directory):
    model = cooper_jax.VerifyRM.load(reward_directory[0], rows=2)
    found = model.score(QUESTIONS, REFERENCES, COMPLETIONS)
    rows = zip(QUESTIONS, REFERENCES, COMPLETIONS, strict=True)
    logits = [compute_logit(reward_directory, *row) for row in rows]
    assert found.dtype == np.float32 and len(set(found.tolist())) == 3
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.asarray(logits))), atol=1e-5)
    np.testing.assert_array_equal(model.score(QUESTIONS[1:2], REFERENCES[1:2], COMPLETIONS[1:2]), found[1:2])
    assert model.score([], [], []).shape == (0,)

    # Any iterable of texts; half of a surrogate pair is replaced.
    others = model.score(np.array(QUESTIONS), iter(REFERENCES), tuple(COMPLETIONS))
    np.testing.assert_array_equal(others, found)
    assert model.score(QUESTIONS[:1], REFERENCES[:1], ["13 \ud83d"]).shape == (1,)


def test_calibrated_scores_use_the_file_beside_the_weights(reward_directory):
    directory = reward_directory[0]
    with pytest.raises(SetupError, match=r"^calibrated=True.*calibration\.json") as error:
        cooper_jax.VerifyRM.load(directory, calibrated=True)
    assert "set --config" not in str(error.value) and "load with calibrated=False" in str(error.value)
    plain = cooper_jax.VerifyRM.load(directory).score(QUESTIONS, REFERENCES, COMPLETIONS)
    calibration.write_calibration(
        directory,
        calibration.Calibration(2.0, 0.5, 10, 5, ece_before=0.1, ece_after=0.1, ece_cross_fitted=None),
    )
    found = cooper_jax.VerifyRM.load(directory, calibrated=True).score(QUESTIONS, REFERENCES, COMPLETIONS)
    (directory / "calibration.json").unlink()
    logits = np.log(plain / (1 - plain))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(logits - 0.5) / 2.0)), atol=1e-5)


def test_what_cannot_be_scored_is_refused(reward_directory, tmp_path):
    model = cooper_jax.VerifyRM.load(reward_directory[0], max_tokens=256)
    with pytest.raises(ValueError, match="3 questions, 3 references, 1 completions: give as many of each"):
        model.score(QUESTIONS, REFERENCES, ["13"])
    with pytest.raises(ValueError, match="questions: give a list of texts"):
        model.score("What?", ["13"], ["13"])
    with pytest.raises(ValueError, match="references: give a list of texts"):
        model.score(["What?"], [13], ["13"])
    with pytest.raises(SetupError, match="reward.max_tokens"):
        model.score(["What?"], ["9" * 500], ["13"])
    with pytest.raises(ValueError, match="completions: give a list of texts"):
        model.score(["What?"], ["13"], [None])
    with pytest.raises(SetupError, match=f"{tmp_path}/nowhere: there is no such directory or file"):
        cooper_jax.VerifyRM.load(tmp_path / "nowhere")
    for wrong, words in (
        ({"rows": 0}, "rows=0: it must be at least 1"),
        ({"dtype": "fp16"}, "float32 or bfloat16"),
    ):
        with pytest.raises(SetupError, match=words):
            cooper_jax.VerifyRM.load(reward_directory[0], **wrong)
    with pytest.raises(SetupError, match="step=3: .* is not a run directory"):
        cooper_jax.VerifyRM.load(reward_directory[0], step=3)


def test_a_language_model_is_no_reward_model(policy_directory):
    with pytest.raises(SetupError, match="^weights='.* has no trained score head") as error:
        cooper_jax.VerifyRM.load(policy_directory[0])
    assert "--" not in str(error.value) and str(error.value).endswith("or a run directory")


# --- Sampler ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    return folder / "hf", *tiny_directories.write_model(folder, "logits")


@pytest.fixture(scope="module")
def sampler(policy_directory):
    return cooper_jax.Sampler.load(policy_directory[0])


MESSAGES = [{"role": "system", "content": "You help."}, {"role": "user", "content": "What is 3 plus 10?"}]


def compute_logits(policy_directory, prompt: list[int], tokens: np.ndarray) -> np.ndarray:
    """The logits f64[T, V] from which a response's tokens were sampled, by one forward pass."""
    _, config, params = policy_directory
    hidden = run_model(config, params, [*prompt, *tokens.tolist()])
    logits = np.asarray(transformer.compute_logits(params, config, hidden)[0], np.float64)
    return logits[len(prompt) - 1 :][: len(tokens)]


def test_replies_come_with_the_log_probabilities_of_their_tokens(sampler, policy_directory):
    samples = sampler.chat(MESSAGES, n=2, temperature=0.7, max_new_tokens=12)
    tokenizer = load_tokenizer_from(str(policy_directory[0]))
    prompt = tokenizer.chat([(m["role"], m["content"]) for m in MESSAGES], fallback=False)
    assert len(samples) == 2 and samples[0].text != samples[1].text
    for sample in samples:
        assert sample.tokens.shape == sample.logprobs.shape and 1 <= len(sample.tokens) <= 12
        assert sample.truncated == (sample.tokens[-1] not in tokenizer.eos_ids)
        kept = sample.tokens if sample.truncated else sample.tokens[:-1]
        assert sample.text == tokenizer.decode(kept.tolist())
        logits = compute_logits(policy_directory, prompt, sample.tokens) / 0.7
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = logprobs[np.arange(len(sample.tokens)), sample.tokens]
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


def test_texts_and_conversations_are_sampled_together(sampler):
    """In the order of the prompts; the same call draws the same tokens, another seed draws others."""
    asked = ["What is 3 plus 10? The", MESSAGES, "What is"]
    found = sampler.generate(asked, n=2, max_new_tokens=6)
    assert [len(samples) for samples in found] == [2, 2, 2]
    again = sampler.generate(asked, n=2, max_new_tokens=6)
    other = sampler.generate(asked, n=2, max_new_tokens=6, seed=1)

    def texts(groups):
        return [[sample.text for sample in samples] for samples in groups]

    assert texts(found) == texts(again) != texts(other)
    assert sampler.generate([]) == []


def test_greedy_samples_are_the_most_likely_tokens(sampler, policy_directory):
    ((sample,),) = sampler.generate(["What is 3 plus"], temperature=0.0, max_new_tokens=5)
    prompt = load_tokenizer_from(str(policy_directory[0])).encode("What is 3 plus")
    logits = compute_logits(policy_directory, prompt, sample.tokens)
    assert sample.tokens.tolist() == logits.argmax(axis=1).tolist()
    assert (sample.logprobs == 0).all()


def test_what_cannot_be_sampled_is_refused(sampler, tmp_path):
    with pytest.raises(ValueError, match="give a list of prompts, even for one"):
        sampler.generate("What is 3 plus 10?")
    for message in ({"content": "b"}, {"role": "user", "content": None}):
        with pytest.raises(ValueError, match="prompt 1 is neither a text nor a list of messages"):
            sampler.generate(["a", [message]])
    with pytest.raises(ValueError, match="messages: give a list, as in .* `generate` continues texts"):
        sampler.chat("What is 3 plus 10?")
    with pytest.raises(
        ValueError, match=r"prompt 0 has \d+ tokens: with max_new_tokens=509 .* the 512 tokens"
    ):
        sampler.generate(["What is 3 plus 10?"], max_new_tokens=509)
    with pytest.raises(ValueError, match="top_p is 0.0, it must be above 0"):
        sampler.generate(["a"], top_p=0.0)
    with pytest.raises(ValueError, match="group_size is 0"):
        sampler.generate(["a"], n=0)
    tiny_directories.write_model(tmp_path, "logits", template=False)
    with pytest.raises(ValueError, match="has no chat template"):
        cooper_jax.Sampler.load(tmp_path / "hf").chat(MESSAGES)


# --- train -----------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_recipe_and_the_recipe_over_the_config():
    cfg = training.make_config("tiny", {"reward.updates": 3, "steps": 2})
    assert cfg.reward.recipe == "robust" and (cfg.reward.updates, cfg.steps) == (3, 2)
    assert cfg.reward.warmup_updates == RECIPES["robust"]["reward.warmup_updates"] and cfg.is_locked
    given = tiny.get_config()
    assert training.make_config(given, {"reward.updates": 3, "steps": 2}).to_dict() == cfg.to_dict()
    assert given.to_dict() == tiny.get_config().to_dict()

    # A field that a script sets by hand must not be overwritten without a word.
    given.reward.updates = 3
    with pytest.raises(
        SetupError, match="reward.updates=3: reward.recipe='robust' sets 2: give the field among"
    ):
        training.make_config(given, {})
    assert training.make_config(given, {"reward.updates": 3}).reward.updates == 3
    given.reward.recipe = ""
    assert training.make_config(given, {}).reward.updates == 3


def test_wrong_settings_are_reported_together():
    with pytest.raises(SetupError) as caught:
        training.make_config("tiny", {"stesp": 2, "steps": "two", "policy.lr": 1e-3})
    unknown, wrong_type, other_section = caught.value.messages
    assert "stesp" in unknown and "did you mean --config.steps" in unknown
    assert wrong_type.startswith("steps='two'") and "policy.optimiser.lr" in other_section
    with pytest.raises(SetupError, match="config=nothing: No such file"):
        cooper_jax.train("nothing")
    with pytest.raises(SetupError, match="reward.arm is 'ruel'"):
        cooper_jax.train("tiny", {"reward.arm": "ruel"})


def test_a_run_without_steps_and_evaluations_has_no_metrics(tmp_path, monkeypatch):
    """It ends after the supervised phases, and other runs start from it."""
    monkeypatch.setattr(training.train_loop, "train", lambda cfg: (tmp_path / "run").mkdir())
    result = cooper_jax.train("tiny", {"run_dir": str(tmp_path / "run"), "steps": 0, "eval.every": 0})
    assert result.metrics == [] and result.run_dir == tmp_path / "run"


def test_a_run_directory_is_told_from_a_models(tmp_path, policy_directory):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"format": 1} | base.get_config().to_dict()))
    with pytest.raises(SetupError, match="the run has no checkpoint yet"):
        choose_model(run, "policy", None)
    assert choose_model(policy_directory[0], "policy", None).run_dir is None
    (run / "checkpoints" / "4").mkdir()
    assert choose_model(run, "policy", None).step == 4
    with pytest.raises(SetupError, match="step 2 is not there; the checkpoints are 4"):
        choose_model(run, "policy", 2)


def test_several_hosts_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SetupError, match="run launch/train.py on each"):
        cooper_jax.train("tiny")


def brevity(completion_lengths, **kwargs):
    return [1 / length for length in completion_lengths]


class Rewriter:
    def rewrite(self, requests):
        return [None for _ in requests]


def define_cell(text: str, number: int) -> dict:
    """The names that a notebook's cell defines: Python knows the text, and there is no file."""
    name = f"/tmp/ipykernel_1/{number}.py"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = {"__name__": "a_notebook"}
    exec(compile(text, name, "exec"), names)
    return names


def test_objects_of_a_file_are_named_by_it():
    """They set the same fields as flags do; a class is one, and a text stays as it is."""
    names = training._name_objects({}, ["rule", brevity], "judges.py:judge", Rewriter, [brevity])
    assert names == {
        "reward.functions": f"rule,{Path(__file__)}:brevity",
        "rule.judge": "judges.py:judge",
        "assistant.kind": f"{Path(__file__)}:Rewriter",
        "log.to": f"{Path(__file__)}:brevity",
    }
    cfg = training.make_config("tiny", names)
    assert read_settings(cfg).reward.function_names == ["rule", f"{Path(__file__)}:brevity"]
    loaded = load_object(read_user_code(cfg.assistant.kind, "assistant.kind"), "assistant.kind")
    assert loaded.__name__ == "Rewriter" and loaded is not Rewriter


def test_a_notebooks_function_is_written_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cell = (
        "import math as m\n"
        "limit = 3\n"
        "def root(completion_lengths: 'Lengths', **kwargs):\n"
        "    return [m.sqrt(n) for n in completion_lengths if not hasattr(n, 'x') or n.limit]\n"
    )
    function = define_cell(cell, 1)["root"]
    name = user_objects.name_object(function, "reward_functions")
    assert name == user_objects.name_object(function, "reward_functions")
    assert name.startswith(str(tmp_path / ".cache" / "cooper_jax" / "functions" / "root_"))
    assert load_object(read_user_code(name, ""), "")([4, 9]) == [2.0, 3.0]

    # Another text has another name: a run with the first one must not resume with it.
    changed = define_cell(cell.replace("m.sqrt", "m.floor"), 2)["root"]
    assert user_objects.name_object(changed, "reward_functions") != name


NEEDS_NOTEBOOK = "limit = 3\ndef f(completions, **kwargs):\n    return [limit for _ in completions]\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda completions: [], "lambdas, methods, instances and nested functions"),
        (lambda: Rewriter(), "instances and nested functions cannot be imported"),
        (lambda: Rewriter().rewrite, "instances and nested functions cannot be imported"),
        (lambda: define_cell(NEEDS_NOTEBOOK, 3)["f"], "'f' uses limit of the notebook"),
        (lambda: define_cell("class A:\n    pass\n", 4)["A"], "only functions may be: write it to a file"),
        (lambda: len, "'len': it is defined in no file"),
    ],
)
def test_objects_without_a_name_are_refused(make, message):
    with pytest.raises(SetupError, match=message):
        cooper_jax.train("tiny", judge=make())


def test_arguments_of_train_are_checked():
    with pytest.raises(SetupError, match="trackers: give a list, even for one"):
        cooper_jax.train("tiny", trackers=brevity)
    with pytest.raises(SetupError, match="log.to: given by an argument of train and among"):
        cooper_jax.train("tiny", {"log.to": ""}, trackers=["tensorboard"])
    with pytest.raises(SetupError, match="reward_functions: give a list, even for one"):
        cooper_jax.train("tiny", reward_functions=brevity)
    with pytest.raises(SetupError, match="reward.functions: given by an argument of train and among"):
        cooper_jax.train("tiny", {"reward.functions": "rule"}, reward_functions=[brevity])


def test_a_script_that_trains_when_it_is_imported_is_refused(tmp_path, monkeypatch):
    """It would train again for each of its functions, and the two would wait for each other."""
    script = tmp_path / "script.py"
    script.write_text(
        "import cooper_jax\n"
        "def reward(completions, **kwargs):\n    return [0.0 for _ in completions]\n"
        "cooper_jax.train('tiny', {'run_dir': 'elsewhere'}, reward_functions=[reward])\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match="runs already in this process; a script .* `if __name__ == "):
        cooper_jax.train("tiny", {"run_dir": "run"}, reward_functions=[f"{script}:reward"])
    assert not (tmp_path / "elsewhere").exists()
