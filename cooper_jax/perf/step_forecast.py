"""Forecast of a step's time: the roofline at published efficiencies, and the host's work.

1. `bound_phases` computes the roofline of each phase of a step on the job's devices: of the work that the step
   must do, not of the programs as they are compiled.
2. A phase's forecast is that bound divided by the mean efficiency of its kind of work (speed_calibration.py), but
   not less than the bound of its compiled programs, which includes what they move and send.
3. `list_host_items` itemises what the host does, from `HostAssumptions`, and how long the devices wait for it.

Assumptions about overlap, from the trainer's (docs/training.md): all responses are taken to end at the same time,
as they are all of full length.  The rule's workers run during scores and log-probabilities, and if no reward
depends on a verdict during the policy's update and the next rollout, too; so does the assistant, behind them.
Nothing runs beside tokenising and checkpoints.  Evaluations and checkpoints are spread over the steps between them.

Nothing is forecast from fewer than speed_calibration.MIN_ROWS published rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cooper_jax.model.config import ModelConfig
from cooper_jax.perf import roofline, speed_calibration
from cooper_jax.perf.aot_job import CompileJob
from cooper_jax.perf.chips import Topology
from cooper_jax.perf.machine import Rates
from cooper_jax.perf.speed_calibration import Calibration
from cooper_jax.policy import grpo
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward import labelled_rollouts
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.rewards import RewardConfig

# The kind of work of each phase.
KIND_OF_PHASE = {
    "rollout": "rollout",
    "score": "score",
    "logprobs": "score",
    "policy": "update",
    "reward": "update",
}
# Bytes of a trained weight in a checkpoint: float32 and two moments of AdamW.
CHECKPOINT_BYTES = 12


@dataclasses.dataclass(frozen=True)
class HostAssumptions:
    """Rates of the work that is not the devices'.  Every field is set by --assume=NAME=VALUE.

    Defaults: of a verdict, that of a slow one (math-verify); of tokenising, measured on one core by
    tests/measure_tokenising.py; the others are guesses.
    """

    verdict_seconds: float = 0.012  # CPU seconds of one worker for a verdict of the rule
    rule_workers: int = 0  # worker processes on each host; 0: rule.workers of the config
    assistant_seconds: float = 2.0  # seconds of a request to the assistant
    assistant_requests: float = 1.0  # requests for a pair
    assistant_concurrency: int = 0  # requests at once, of each host; 0: assistant.concurrency of the config
    tokenise_us: float = 2.1  # microseconds to render and tokenise one token of the reward model's inputs
    checkpoint_gb_per_second: float = 1.0  # of each host


@dataclasses.dataclass(frozen=True)
class HostItem:
    """A kind of work on the host, for one step."""

    name: str
    seconds: float  # of the work itself
    waiting: float  # that the devices wait for it
    basis: str  # the arithmetic, in words


@dataclasses.dataclass(frozen=True)
class StepForecast:
    """A step's forecast: of the devices by phase, and of the host by item."""

    bounds: dict[str, float]  # seconds of each phase at the chip's peaks: the work that must be done
    phases: dict[str, float]  # seconds of each phase at published efficiencies
    items: tuple[HostItem, ...]
    ahead: bool  # the rollout of the next step runs beside the other phases
    errors: dict[
        str, float
    ]  # of each phase: the median factor by which its efficiency misses a published row

    @property
    def device_seconds(self) -> float:
        """Seconds of the devices, without waiting."""
        return _combine(self.phases, self.ahead, 0.0)

    @property
    def waiting(self) -> float:
        """Seconds that the devices wait for the host."""
        return sum(item.waiting for item in self.items)

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return _combine(self.phases, self.ahead, self.waiting)


def _combine(phases: dict[str, float], ahead: bool, waiting: float) -> float:
    """Add up the phases and the waiting; with a rollout ahead, of the slower side."""
    total = sum(phases.values())
    if not ahead:
        return total + waiting
    return max(phases["rollout"], total - phases["rollout"] + waiting)


def forecast_step(
    job: CompileJob,
    topology: Topology,
    compiled: dict[str, float],
    assumptions: HostAssumptions,
    calibration: Calibration,
) -> StepForecast | None:
    """Forecast a step; None if there are too few published rows.

    compiled: the bound of each phase's compiled programs, in seconds.
    """
    if not calibration.usable or any(kind not in calibration.efficiencies for kind in KIND_OF_PHASE.values()):
        return None

    bounds = {name: bound for name, bound in bound_phases(job, topology).items() if name in compiled}
    phases = {}
    for name, bound in bounds.items():
        efficiency = calibration.efficiencies[KIND_OF_PHASE[name]]
        phases[name] = max(bound / efficiency, compiled[name])
    items = list_host_items(job, topology, assumptions, phases)
    items.append(_spread_evaluation(job, topology, calibration.efficiencies["rollout"]))
    errors = {}
    for name in phases:
        # A kind without two rows has no error of its own.
        own_error = calibration.median_error(own=False, kind=KIND_OF_PHASE[name])
        errors[name] = own_error or calibration.median_error(own=False) or 1.0
    return StepForecast(bounds, phases, tuple(items), job.ahead is not None, errors)


# --- the devices -------------------------------------------------------------------------------------------


def bound_phases(job: CompileJob, topology: Topology) -> dict[str, float]:
    """Compute the roofline of each phase that a step may have, in seconds.

    A shard of the batch decodes its own responses, with the weights on the devices of its tensor axis; in the other
    phases all devices share the work evenly.
    """
    cfg, devices = job.cfg, job.layout.mesh.size
    policy_settings = PolicyConfig.from_config(cfg.policy)
    responses = cfg.data.prompts_per_step * cfg.rollout.group_size
    lengths = np.full(responses, cfg.rollout.max_new_tokens)
    prompt_tokens = cfg.data.max_prompt_tokens

    def bound(work: dict[str, roofline.Work], times: float = 1.0) -> float:
        return times * roofline.roofline_seconds(work, _rates(topology, devices))

    times = policy_settings.has_reference + (grpo.count_updates(policy_settings) > 1)
    update = roofline.update_work(
        job.policy, prompt_tokens, lengths, policy_settings.epochs, grpo.count_updates(policy_settings)
    )
    bounds = {
        "rollout": _bound_rollout(job, topology, cfg.data.prompts_per_step, cfg.rollout.group_size),
        "logprobs": bound(roofline.score_work(job.policy, prompt_tokens, lengths), times),
        "policy": bound(update),
    }
    if job.reward is not None:
        inputs = np.full(responses, job.reward_tokens)
        bounds["score"] = bound(roofline.reward_score_work(job.reward, inputs))
        bounds["reward"] = _bound_reward_update(job, job.reward, topology)
    return {name: bounds[name] for name in KIND_OF_PHASE if name in bounds}


def _bound_rollout(job: CompileJob, topology: Topology, prompts: int, group: int) -> float:
    """Compute the roofline of a rollout: that of one shard, on its part of the prompts."""
    rollout = job.rollout_job
    spec, layout = rollout.rollout.spec, rollout.layout
    # Prompts that do not divide over the shards: the fullest shard decides.
    own_prompts = -(-prompts // layout.batch_shards)
    rows = own_prompts * group
    work = roofline.rollout_work(
        rollout.policy,
        own_prompts,
        job.cfg.data.max_prompt_tokens,
        np.full(rows, spec.max_new_tokens),
        min(rollout.slots, rows),
        weight_bytes=jnp.dtype(spec.dtype).itemsize,
        cache_bytes=jnp.dtype(spec.kv_dtype or spec.dtype).itemsize,
    )
    return roofline.roofline_seconds(work, _rates(topology, layout.mesh.size // layout.batch_shards))


def _bound_reward_update(job: CompileJob, reward: ModelConfig, topology: Topology) -> float:
    """Compute the roofline of a step's updates of the reward model: on pairs and on labelled rows."""
    settings = RewardUpdateConfig.from_config(job.cfg.reward)
    rows = 2 * count_pairs(job) * settings.reads_pairs + labelled_rollouts.max_rows_per_update(settings)
    work = roofline.pair_update_work(reward, np.full(rows, job.reward_tokens))
    return settings.updates * roofline.roofline_seconds(work, _rates(topology, job.layout.mesh.size))


def _rates(topology: Topology, devices: int) -> Rates:
    return Rates(topology.chip.flops, topology.chip.bandwidth, {}).times(devices)


# --- the host ----------------------------------------------------------------------------------------------


def count_pairs(job: CompileJob) -> int:
    """The largest number of pairs of a step."""
    return job.cfg.data.prompts_per_step * job.cfg.pairs.per_prompt


def list_host_items(
    job: CompileJob, topology: Topology, assumptions: HostAssumptions, phases: dict[str, float]
) -> list[HostItem]:
    """Itemise the host's work of a step.  phases: the devices' seconds, behind which some of it is hidden."""
    cfg = job.cfg
    hosts = len({device.process_index for device in topology.devices})
    responses = cfg.data.prompts_per_step * cfg.rollout.group_size

    # Verdicts: the workers of all hosts share them.
    workers = hosts * (assumptions.rule_workers or cfg.rule.workers)
    seconds = responses * assumptions.verdict_seconds / workers
    hidden, place = _find_room(job, phases)
    items = [
        HostItem(
            "verdicts",
            seconds,
            max(0.0, seconds - hidden),
            f"{responses:,} x {assumptions.verdict_seconds * 1e3:g} ms / {workers} workers, {place}",
        )
    ]
    if job.reward is not None:
        items.append(_tokenise(job, responses, assumptions))
    if cfg.reward.arm == "cooper" and cfg.assistant.kind not in ("local", "corrupt"):
        items.append(_ask_assistant(job, hosts, assumptions, phases))
    items.append(_save_checkpoints(job, hosts, assumptions))
    return items


def _find_room(job: CompileJob, phases: dict[str, float]) -> tuple[float, str]:
    """The devices' seconds behind which verdicts are hidden, and their name."""
    hidden = phases.get("score", 0.0) + phases.get("logprobs", 0.0)
    if not job.cfg.overlap:
        return 0.0, "in sequence"
    if RewardConfig.from_config(job.cfg.reward).reads_verdicts:
        return hidden, "behind scores and log-probabilities"
    hidden += phases["policy"]
    if _finishes_behind_rollout(job):
        return hidden + phases[
            "rollout"
        ], "behind scores, log-probabilities, the policy's update and the next rollout"
    return hidden, "behind scores, log-probabilities and the policy's update"


def _finishes_behind_rollout(job: CompileJob) -> bool:
    """True if the pairs are awaited after the next rollout (trainer/step.py)."""
    cfg = job.cfg
    return bool(cfg.overlap and cfg.reward.arm == "cooper" and not cfg.rollout.ahead and not cfg.mesh.reward)


def _tokenise(job: CompileJob, responses: int, assumptions: HostAssumptions) -> HostItem:
    # Every host tokenises the inputs of all responses: the batch is the same on each.
    tokens = responses * job.reward_tokens
    seconds = tokens * assumptions.tokenise_us * 1e-6
    return HostItem(
        "tokenising",
        seconds,
        seconds,
        f"{tokens:,} tokens x {assumptions.tokenise_us:g} us, when the responses have ended",
    )


def _ask_assistant(
    job: CompileJob, hosts: int, assumptions: HostAssumptions, phases: dict[str, float]
) -> HostItem:
    # The hosts share the requests, each with as many at once.
    requests = count_pairs(job) * assumptions.assistant_requests
    at_once = hosts * (assumptions.assistant_concurrency or job.cfg.assistant.concurrency)
    # Requests that do not fill the last round take as long as a full one.
    seconds = float(np.ceil(requests / at_once)) * assumptions.assistant_seconds
    hidden, place = 0.0, "in sequence"
    if job.cfg.overlap:
        hidden, place = phases["policy"], "behind the policy's update"
    if _finishes_behind_rollout(job):
        hidden, place = hidden + phases["rollout"], f"{place} and the next rollout"
    return HostItem(
        "assistant",
        seconds,
        max(0.0, seconds - hidden),
        f"{requests:,.0f} requests x {assumptions.assistant_seconds:g} s, {at_once} at once, {place}",
    )


def _save_checkpoints(job: CompileJob, hosts: int, assumptions: HostAssumptions) -> HostItem:
    weights = sum(roofline.count_weights(job.policy))
    if job.reward is not None and job.cfg.reward.arm == "cooper":
        weights += sum(roofline.count_weights(job.reward))
    gigabytes = CHECKPOINT_BYTES * weights / 1e9
    seconds = gigabytes / (hosts * assumptions.checkpoint_gb_per_second) / job.cfg.checkpoint.every
    return HostItem(
        "checkpoint",
        seconds,
        seconds,
        f"{gigabytes:,.1f} GB at {hosts * assumptions.checkpoint_gb_per_second:g} GB/s, every "
        f"{job.cfg.checkpoint.every} steps",
    )


def _spread_evaluation(job: CompileJob, topology: Topology, efficiency: float) -> HostItem:
    """The periodic evaluation, which the devices do: a rollout of its own."""
    section = job.cfg.eval
    samples = section.samples + section.greedy
    if not section.every:
        return HostItem("evaluation", 0.0, 0.0, "none")
    seconds = _bound_rollout(job, topology, section.problems, samples) / efficiency / section.every
    return HostItem(
        "evaluation",
        seconds,
        seconds,
        f"{section.problems} problems x {samples} every {section.every} steps, at the rollout's efficiency",
    )


def parse_assumptions(texts: Sequence[str]) -> HostAssumptions:
    """Read NAME=VALUE texts, of the fields of HostAssumptions.

    Raises SetupError for an unknown name and for a value that is no number or out of range.
    """
    defaults, changes = HostAssumptions(), {}
    names = [field.name for field in dataclasses.fields(HostAssumptions)]
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names:
            raise SetupError(f"--assume={text}: {name!r} is none of {', '.join(names)}")
        kind = type(getattr(defaults, name))
        try:
            number = kind(value)
        except ValueError as error:
            raise SetupError(f"--assume={text}: {value!r} is no {kind.__name__}") from error
        # A rate divides; the other values may be 0.
        least_allowed = name != "checkpoint_gb_per_second"
        if not number >= 0 or (number == 0 and not least_allowed):
            raise SetupError(f"--assume={text}: it must be {'at least' if least_allowed else 'above'} 0")
        changes[name] = number
    return dataclasses.replace(defaults, **changes)


# --- reports -----------------------------------------------------------------------------------------------


def format_forecast(forecast: StepForecast, calibration: Calibration, *, steps: int, devices: int) -> str:
    """Write the host's items, the step's forecast and that of the whole run.

    steps: of the run.  devices: of the topology.
    """
    lines = [f"{'':15}{'work':>10}{'waiting':>11}  assumptions (--assume=NAME=VALUE changes them)"]
    for item in forecast.items:
        lines.append(f"{item.name:15}{item.seconds:8.3f} s{item.waiting:9.3f} s  {item.basis}")

    total = forecast.seconds
    low, high = (_combine_scaled(forecast, power) for power in (-1, 1))
    hours = steps * total / 3600
    lines += [
        f"a step at published efficiencies: {total:.1f} s, of which the devices wait {forecast.waiting:.1f} s",
        f"{low:.1f} to {high:.1f} s if each efficiency misses by its median error on published rows",
        f"{steps} steps: {hours:,.1f} h, {hours * devices:,.1f} device-hours, without the start and compiling",
        f"({speed_calibration.describe_fit(calibration)})",
    ]
    return "\n".join(lines)


def _combine_scaled(forecast: StepForecast, power: int) -> float:
    """Seconds of the step if every phase took its error times (power=1), or a part (power=-1), of its forecast."""
    phases = {name: seconds * forecast.errors[name] ** power for name, seconds in forecast.phases.items()}
    return _combine(phases, forecast.ahead, forecast.waiting)


def forecast_to_json(forecast: StepForecast) -> dict[str, Any]:
    """Convert a forecast to JSON values."""
    return dataclasses.asdict(forecast) | {
        "device_seconds": forecast.device_seconds,
        "waiting": forecast.waiting,
        "seconds": forecast.seconds,
    }
