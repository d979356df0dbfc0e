"""The models of a server: loaded, with their programs compiled, behind one thread that uses the devices."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from cooper_jax.evaluation.evaluated_models import ChosenModels, RewardModel
from cooper_jax.model.loading import check_length
from cooper_jax.rollout import engine
from cooper_jax.rollout.rollout_config import RolloutConfig
from cooper_jax.rollout.rollout_state import RolloutStatic
from cooper_jax.runtime import device_layouts, hosts
from cooper_jax.serving.chat_engine import ChatEngine, EngineSizes, NewTokens
from cooper_jax.serving.chat_service import ChatService
from cooper_jax.serving.device_loop import DeviceLoop, Worker
from cooper_jax.serving.score_service import ScoreService
from cooper_jax.serving.scorer import Scorer
from cooper_jax.serving.serve_config import ServeConfig
from cooper_jax.settings.setup_errors import SetupError

# Scores are computed at this many widths, all of which are compiled when the server starts.
SCORE_WIDTHS = 8


@dataclasses.dataclass
class ServedModels:
    """The services that the HTTP side uses, and the thread behind them."""

    chat: ChatService | None
    scores: ScoreService | None
    loop: DeviceLoop

    def compile_programs(self) -> None:
        """Compile all programs that a request may need, and say which.  Raises hosts.Stopped after SIGTERM."""
        started = time.monotonic()
        for name in self._list_programs():
            hosts.raise_if_stopping()
            print(f"compiling: {name}", flush=True)
        print(f"compiled all programs in {time.monotonic() - started:.0f} s", flush=True)

    def _list_programs(self) -> Iterator[str]:
        if self.chat is not None:
            yield from self.chat.engine.compile_programs()
        if self.scores is not None:
            yield from self.scores.scorer.compile_programs()


def load_models(chosen: ChosenModels, config: ServeConfig, on_failure: Callable[[], None]) -> ServedModels:
    """Load the models that `serve.models` names.

    on_failure: called if the devices' thread ends with an error.

    Raises SetupError for models that cannot be loaded or served, and if there is none to serve.
    """
    if jax.process_count() > 1:
        raise SetupError("a server runs in one process, with all its devices: start it on one host")
    names = choose_names(chosen, config.models)
    layouts = device_layouts.make_layouts(chosen.cfg)
    wakers: list[
        Callable[[], None]
    ] = []  # filled below: the loop needs the workers, and they need to wake it

    def wake() -> None:
        for waker in wakers:
            waker()

    workers: list[Worker] = []
    chat = scores = None
    if "policy" in names:
        chat = _load_policy(chosen, config, layouts["policy"], wake)
        workers.append(chat.engine)
    if "reward" in names:
        scores = _load_reward(chosen, config, layouts["reward"], wake)
        workers.append(scores.scorer)
    loop = DeviceLoop(workers, on_failure)
    wakers.append(loop.wake)
    return ServedModels(chat, scores, loop)


def choose_names(chosen: ChosenModels, models: str) -> list[str]:
    """Choose the models to serve: policy, reward or both.

    models: the setting `serve.models`.  Raises SetupError if there is none.
    """
    if models != "all":
        return [models]
    if chosen.run_dir is not None:
        return ["policy"] if chosen.cfg.reward.arm == "rule" else ["policy", "reward"]
    names = [name for name in ("policy", "reward") if chosen.cfg[name].weights not in ("", "random")]
    if not names:
        raise SetupError(
            "there is no model to serve: give --run_dir=RUN, --config.policy.weights=DIR or "
            "--config.reward.weights=DIR"
        )
    return names


def _load_policy(chosen: ChosenModels, config: ServeConfig, layout, wake: Callable[[], None]) -> ChatService:
    """Load the policy and open its engine."""
    print("loading the policy", flush=True)
    model, params = chosen.load("policy", layout)
    lengths = {"serve.max_prompt_tokens": config.max_prompt_tokens}
    check_length(model.config, "policy", lengths | {"serve.max_new_tokens": config.max_new_tokens})

    # The requests bring their own sampling settings; the limits of replies are the server's.
    rollout = RolloutConfig.from_config(chosen.cfg.rollout)
    spec = rollout.make_sampling_spec(
        model.tokenizer.eos_ids,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        group_size=1,
        max_new_tokens=config.max_new_tokens,
        segment=config.segment,
    )
    options = rollout.make_engine_options()
    implementation = options["implementation"] or engine.choose_kernels(model.config.base, layout)
    if config.slots % layout.batch_shards:
        raise SetupError(
            f"serve.slots={config.slots}: it must be a multiple of the mesh's {layout.batch_shards} batch shards"
        )
    gathered = engine.should_gather(
        model.config.base, layout, spec, options["weight_placement"], options["memory_gib"]
    )
    weights = engine.copy_rollout_weights(params, model.config, layout, spec.dtype, gathered)
    sizes = EngineSizes(config.slots // layout.batch_shards, config.max_prompt_tokens, config.max_waiting)
    static = RolloutStatic(model.config.base, layout, spec, implementation)

    def deliver(events: list[NewTokens]) -> None:
        service.receive(events)

    chat_engine = ChatEngine(weights, static, sizes, deliver)
    service = ChatService(model.tokenizer, chat_engine, config.max_new_tokens, wake)
    return service


def _load_reward(chosen: ChosenModels, config: ServeConfig, layout, wake: Callable[[], None]) -> ScoreService:
    """Load the reward model."""
    print("loading the reward model", flush=True)
    fitted = chosen.read_calibration()
    model, params = chosen.load("reward", layout)
    cfg = set_widths(chosen.cfg, model.config.max_len)
    reward = RewardModel(cfg, layout, model, params, fitted)
    scorer = Scorer(reward, config.max_waiting_scores, lambda requests: service.receive(requests))
    service = ScoreService(scorer, wake)
    return service


def set_widths(cfg: ConfigDict, max_len: int | None) -> ConfigDict:
    """Copy the config with few widths of the reward model's inputs.

    max_len: the model's context length, which limits reward.max_tokens.
    """
    cfg = cfg.copy_and_resolve_references()
    if max_len is not None:
        cfg.reward.max_tokens = min(cfg.reward.max_tokens, max_len)
    cfg.data.bucket = max(1, -(-cfg.reward.max_tokens // SCORE_WIDTHS))
    return cfg
