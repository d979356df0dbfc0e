"""Before the first Cooper step: short supervised phases, the frozen reference, and the checkpoint of step 0.

1. `warmup.policy_steps` of imitation: a policy made from scratch must learn to answer at all.
2. `warmup.reward_steps` of binary cross-entropy on labelled triples, read from a file or built from worked
   solutions: the solution (1), a corruption of it (0), the solution beside another problem's reference (0).
   `warmup.start` takes the models as another run had them at its step 0, in place of both.
3. The policy as it then stands is the reference.  It is evaluated, and everything is saved as step 0: a run that is
   killed later resumes from there or from a newer checkpoint, and does not repeat this.

In the paper VerifyRM is trained on 58.7K annotated completions before all this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cooper_jax import stages, warm_start
from cooper_jax.assembly import Cooper, State, policy_prompt
from cooper_jax.data import labelled, packing, prompts, synthetic
from cooper_jax.data import problems as problem_sets
from cooper_jax.model import transformer
from cooper_jax.policy import imitation
from cooper_jax.reward import verifier_model
from cooper_jax.reward.corruption import corrupt
from cooper_jax.reward.lessons import Replay
from cooper_jax.runtime import checkpoint, hosts, keys, mesh, optim
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.metrics import to_host
from cooper_jax.runtime.rundir import Run, config_hash
from cooper_jax.settings import SetupError, boundary
from cooper_jax.types import Metrics, Params, Problem, TrainState, Triple

REPORTS = 8  # lines that a supervised phase prints
SYNTHETIC_POOL = 16384  # distinct synthetic problems that a supervised phase draws from, at most


def start_or_resume(
    cooper: Cooper,
    state: State,
    run: Run,
    checkpoints: Checkpoints,
    measure: Callable[[Cooper, State], Metrics],
) -> State:
    """The state to go on from: the newest checkpoint's, or step 0 after the supervised phases, logged as `measure`
    finds it."""
    if not checkpoints.steps():
        return _begin(cooper, state, run, checkpoints, measure)
    likes = {name: checkpoint.abstract(tree) for name, tree in items(state).items()}
    # What the checkpoint replaces goes first: together they would be twice a run's memory.
    jax.tree.map(lambda x: x.delete(), (state.policy, state.reward))
    with boundary(f"{checkpoints.folder}"):
        step, trees, loop = checkpoints.restore_newest(likes, vocab_sizes(cooper))
    if loop["config_hash"] != config_hash(cooper.cfg):
        raise SetupError(
            f"{checkpoints.folder / str(step)} was saved under another config than the run directory's "
            "config.json says: give another --config.run_dir"
        )
    policy = checkpoint.join(trees["policy"], trees["policy_optimiser"])
    reward = checkpoint.join(trees["reward"], trees["reward_optimiser"]) if "reward" in trees else None
    with boundary(f"{checkpoints.reference}"):
        reference = _restore_reference(cooper, checkpoints)
    with boundary("run_dir"):
        run.truncate(step)
    hosts.say(f"resumed from step {step}")
    replay = Replay.from_json(loop["replay"]) if "replay" in loop else Replay()
    return State(
        policy=policy, reward=reward, reference=reference, step=step, position=loop["position"], replay=replay
    )


def save(cooper: Cooper, state: State, run: Run, checkpoints: Checkpoints) -> None:
    """Save a state, after what was logged about it lies in the run directory; the reference is kept apart, once."""
    run.flush()
    loop = {"position": state.position, "config_hash": config_hash(cooper.cfg)}
    if cooper.cfg.reward.replay:
        loop["replay"] = state.replay.to_json()
    checkpoints.save(state.step, items(state), loop)


def items(state: State) -> dict:
    """A state as named checkpoint items: weights apart from optimisers."""
    names = {"policy": state.policy} | ({} if state.reward is None else {"reward": state.reward})
    split = {name: checkpoint.split(part) for name, part in names.items()}
    return {name: params for name, (params, _) in split.items()} | {
        f"{name}_optimiser": optimiser for name, (_, optimiser) in split.items()
    }


def vocab_sizes(cooper: Cooper) -> dict[str, int]:
    """Of each checkpoint item: its vocabulary may have been padded otherwise, on another mesh."""
    wings = {"policy": cooper.policy} | ({} if cooper.reward is None else {"reward": cooper.reward})
    sizes = {name: wing.model.config.vocab_size for name, wing in wings.items()}
    return sizes | {f"{name}_optimiser": size for name, size in sizes.items()}


def _begin(cooper: Cooper, state: State, run: Run, checkpoints: Checkpoints, measure: Callable) -> State:
    section = cooper.cfg.warmup
    with boundary("run_dir"):
        run.truncate(None)
    policy, reward = state.policy, state.reward
    if section.start:
        policy, reward = _as_another_run(cooper, policy, reward)
    elif section.policy_steps:
        params = _imitate(cooper, policy.params)
        policy = optim.init(params, cooper.policy.optimiser)
    if section.reward_steps and reward is not None and not section.start:
        params = _teach(cooper, reward.params)
        reward = optim.init(params, cooper.reward.optimiser)
    with boundary("checkpoint"):
        checkpoints.save_reference(policy.params)
    if cooper.policy.reference_layout == cooper.layout:
        # A copy: the policy's own arrays are donated to its updates.
        reference = jax.tree.map(lambda x: x.copy(), policy.params)
    else:  # devices that share none with the policy's take it from the disk
        reference = _restore_reference(cooper, checkpoints)
    state = State(policy=policy, reward=reward, reference=reference, step=0, position=0)
    state = warm_start.run(cooper, state)
    if cooper.cfg.eval.every and (metrics := measure(cooper, state)):
        with boundary("run_dir"):
            run.log(0, metrics)
    save(cooper, state, run, checkpoints)
    return state


def _as_another_run(
    cooper: Cooper, policy: TrainState, reward: TrainState | None
) -> tuple[TrainState, TrainState | None]:
    """The models of `warmup.start`'s step 0, with new optimisers."""
    where, wings = cooper.cfg.warmup.start, {"policy": (cooper.policy, policy)}
    if reward is not None:
        wings["reward"] = (cooper.reward, reward)
    loaded: dict[str, TrainState | None] = {"reward": None}
    with boundary(f"warmup.start={where}"):
        with Checkpoints(where, keep=0, read_only=True) as kept:
            for name, (wing, state) in wings.items():
                like = checkpoint.abstract(state.params)
                params = kept.restore(0, name, like, wing.model.config.vocab_size)
                loaded[name] = optim.init(params, wing.optimiser)
    return loaded["policy"], loaded["reward"]


def _restore_reference(cooper: Cooper, checkpoints: Checkpoints) -> Params:
    config = cooper.policy.model.config
    like = mesh.abstract(cooper.policy.reference_layout, transformer.param_specs(config))
    return checkpoints.restore_reference(like, config.vocab_size)


def _imitate(cooper: Cooper, params: Params) -> Params:
    """Likelihood of worked solutions, EOS included."""
    section, model, layout = cooper.cfg.warmup, cooper.policy.model, cooper.layout
    problems = _with_solutions(cooper, "warmup_policy", section.policy_steps * section.policy_batch)
    opt = optim.make(section.policy_optimiser)
    update = imitation.make_update(
        model.config, layout, opt,
        dtype=cooper.cfg.policy.dtype, remat=cooper.cfg.policy.remat, microbatch=section.policy_batch,
    )  # fmt: skip

    def batch(step: int) -> tuple:
        prompts, responses = [], []
        for position, problem in _draw(
            problems, step, section.policy_batch, cooper.cfg.seed, "warmup_policy"
        ):
            rng = keys.numpy_stream(cooper.cfg.seed, "demonstrations", position)
            text = problem.solution
            if cooper.oracle is not None:
                text, _ = synthetic.demonstration(
                    problem, rng, corrupt=section.policy_corrupt, habit=section.policy_habit
                )
            prompts.append(policy_prompt(cooper.cfg, model.tokenizer, problem))
            responses.append([*model.tokenizer.encode(text), model.tokenizer.eos_ids[0]])
        bucket, multiple = cooper.cfg.data.bucket, layout.batch_shards
        left, left_valid = packing.pad(prompts, left=True, bucket=bucket, rows_multiple=multiple)
        right, right_valid = packing.pad(responses, left=False, bucket=bucket, rows_multiple=multiple)
        arrays = np.concatenate([left, right], 1), np.concatenate([left_valid, right_valid], 1), right_valid
        return tuple(layout.put(x, "batch") for x in arrays)

    state = optim.init(params, opt)
    return _phase("policy", section.policy_steps, state, lambda s, step: update(s, *batch(step)))


def _teach(cooper: Cooper, params: Params) -> Params:
    """Binary cross-entropy on labelled triples, as VerifyRM is trained (arXiv 2508.05613)."""
    section, layout, seed = cooper.cfg.warmup, cooper.reward.layout, cooper.cfg.seed
    if section.reward_data:
        with boundary(f"warmup.reward_data={section.reward_data}"):
            triples = labelled.load(section.reward_data)
            references = {t.reference for t in triples}
            prompts.check_references(cooper.reward.model.tokenizer, references, cooper.cfg.reward.max_tokens)
        draw = _triples_of_file(triples, seed)
    else:
        problems = _with_solutions(cooper, "warmup_reward", section.reward_steps * section.reward_batch)
        draw = _triples_of_solutions(cooper, problems)
    opt = optim.make(section.reward_optimiser)
    update = verifier_model.make_bce_update(cooper.reward.model.config, cooper.cfg.reward, opt, layout)

    def batch(step: int) -> tuple:
        triples = draw(step, section.reward_batch)
        rows = [stages.render(cooper, Problem(t.question, t.reference), t.completion) for t in triples]
        scores = stages.score_batch(cooper, rows)
        n = scores.tokens.shape[0]
        labels = packing.pad_rows(np.array([t.label for t in triples], np.float32), n)
        weights = packing.pad_rows(np.ones(len(triples), np.float32), n)
        return scores, layout.put(labels, "batch"), layout.put(weights, "batch")

    state = optim.init(params, opt)
    return _phase("reward", section.reward_steps, state, lambda s, step: update(s, *batch(step)))


def _phase(name: str, steps: int, state: TrainState, update: Callable[[TrainState, int], tuple]) -> Params:
    """`steps` updates with a progress line; the optimiser of the phase is not kept."""
    for step in range(steps):
        hosts.look()
        state, metrics = update(state, step)
        if (step + 1) % max(1, steps // REPORTS) == 0:
            values = to_host({n: v for n, v in metrics.items() if n in ("loss", "accuracy")})
            said = "  ".join(f"{n} {v:.3f}" for n, v in values.items())
            hosts.say(f"warm-up of the {name} model: step {step + 1}/{steps}  {said}")
    if skipped := int(state.skipped):
        if skipped == steps:
            raise SetupError(
                f"warm-up of the {name} model: loss or gradients were not finite in any of {steps} updates: lower "
                f"--config.warmup.{name}_optimiser.lr, or look at the weights that it starts from"
            )
        hosts.say(f"warm-up of the {name} model: {skipped} of {steps} updates left out as not finite")
    return state.params


def _draw(items: Sequence, step: int, count: int, seed: int, stream: str) -> list[tuple[int, Any]]:
    """The step's items with their places in the phase's own order."""
    positions = range(step * count, (step + 1) * count)
    return [(p, items[problem_sets.problem_at(p, len(items), seed, stream)]) for p in positions]


def _with_solutions(cooper: Cooper, split: str, wanted: int) -> list[Problem]:
    """Problems of this phase that have a worked solution: the synthetic split's, or the training data's."""
    if cooper.oracle is not None:
        return synthetic.problems(cooper.cfg.seed, min(wanted, SYNTHETIC_POOL), split)
    found = [p for p in cooper.train if p.solution]
    if len(found) < 2:
        raise SetupError(
            f"warmup needs problems with worked solutions, and data.train={cooper.cfg.data.train} has "
            f"{len(found)}: set data.solution_key, or warmup.reward_data, or warmup steps to 0"
        )
    return found


def _triples_of_file(triples: Sequence[Triple], seed: int) -> Callable[[int, int], list[Triple]]:
    return lambda step, count: [triple for _, triple in _draw(triples, step, count, seed, "warmup_reward")]


def _triples_of_solutions(cooper: Cooper, problems: Sequence[Problem]) -> Callable[[int, int], list[Triple]]:
    """Right and wrong side by side: a solution (1), then a corruption of it or, every third time, the same
    solution beside another problem's reference (0).

    What a pair shares cancels in the gradient, so that the little that decides is learned first.
    """
    seed = cooper.cfg.seed
    references = list(dict.fromkeys(p.reference for p in problems))
    if len(references) < 2:
        raise SetupError(
            "warmup.reward_steps: all problems have one reference answer; set warmup.reward_data"
        )

    def pair(position: int, problem: Problem) -> list[Triple]:
        rng = keys.numpy_stream(seed, "triples", position)
        if cooper.oracle is not None:
            habit = cooper.cfg.warmup.reward_habit
            return [
                synthetic.triple(problem, rng, right=right, others=problems, habit=habit)
                for right in (True, False)
            ]
        wrong = corrupt(problem.solution, rng)
        good = Triple(problem.question, problem.reference, problem.solution, 1.0)
        if wrong is not None and position % 3 != 2:
            return [good, dataclasses.replace(good, completion=wrong, label=0.0)]
        other = references[int(rng.integers(len(references)))]
        if other == problem.reference:  # distinct, so its neighbour is another
            other = references[references.index(other) - 1]
        return [good, dataclasses.replace(good, reference=other, label=0.0)]

    def draw(step: int, count: int) -> list[Triple]:
        drawn = _draw(problems, step, count // 2, seed, "warmup_reward")
        return [t for p, problem in drawn for t in pair(p, problem)]

    return draw
