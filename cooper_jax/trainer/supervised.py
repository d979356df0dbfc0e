"""Supervised phases before step 1: imitation for the policy, labelled triples for the reward model.

1. `imitate_solutions` makes `supervised.policy_steps` updates on the likelihood of worked solutions.  A
   randomly initialised policy needs them to give any answer.
2. `train_on_labels` makes `supervised.reward_steps` updates of binary cross-entropy on triples (question,
   reference, completion) with a label.  They are read from `supervised.reward_data`, or built from worked
   solutions: a solution (label 1), a corruption of it (0), a solution with another problem's reference (0).

The paper trains VerifyRM on 58.7K annotated completions before RL; launch/train_rm.py does that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from cooper_jax.data import labelled_completions, packing, policy_prompts, prompts, synthetic
from cooper_jax.data import problems as problem_sets
from cooper_jax.policy import imitation
from cooper_jax.reward import verifier_model
from cooper_jax.reward.corruption import corrupt_answer
from cooper_jax.runtime import hosts, keys, optim
from cooper_jax.runtime.console import CONSOLE
from cooper_jax.runtime.metrics import to_host
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer.grading import encode_reward_input, pad_reward_inputs
from cooper_jax.trainer.state import Components
from cooper_jax.types import Metrics, Params, Problem, TrainState, Triple

# The numbers of progress lines and of logged rows of a phase: so many, and at most about twice as many.
REPORTS = 8
ROWS = 100

# Called with the name of a phase, the number of an update and its figures.
LogPhase = Callable[[str, int, Metrics], None]

# The number of distinct synthetic problems of a phase, at most.  Longer phases repeat them in another order.
SYNTHETIC_POOL = 16384

Item = TypeVar("Item")


def imitate_solutions(components: Components, params: Params, log: LogPhase) -> Params:
    """Train the policy on the likelihood of worked solutions, the EOS included; return its parameters.

    log: called with the figures of some of the updates.

    Raises SetupError if the problems have no worked solutions or no update was finite, hosts.Stopped after a
    SIGTERM.
    """
    settings, model, layout = components.settings, components.policy.model, components.layout
    section = settings.supervised
    problems = _problems_with_solutions(
        components, "supervised_policy", section.policy_steps * section.policy_batch
    )
    optimiser = optim.make_optimiser(settings.imitation_optimiser, section.policy_steps)
    update = imitation.make_imitation_update(
        model.config,
        layout,
        optimiser,
        dtype=settings.policy.dtype,
        remat=settings.policy.remat,
        microbatch=section.policy_batch,
    )

    def make_batch(step: int) -> tuple[Any, ...]:
        prompt_rows, responses = [], []
        for position, problem in _draw_items(
            problems, step, section.policy_batch, settings.seed, "supervised_policy"
        ):
            text = problem.solution
            if components.oracle is not None:
                # Some synthetic demonstrations are wrong, so that RL has something to improve.
                rng = keys.make_generator(settings.seed, "demonstrations", position)
                text, _ = synthetic.make_demonstration(
                    problem, rng, corrupt=section.policy_corrupt, habit=section.policy_habit
                )

            prompt_rows.append(
                policy_prompts.encode_policy_prompt(model.tokenizer, problem, settings.data.prompt_style)
            )
            responses.append([*model.tokenizer.encode(text), model.tokenizer.eos_ids[0]])

        # Prompts are left-padded and responses right-padded: all responses start at the same column.
        options = dict(bucket=settings.data.bucket, rows_multiple=layout.batch_shards)
        left, left_valid = packing.pad_tokens(prompt_rows, left=True, **options)
        right, right_valid = packing.pad_tokens(responses, left=False, **options)
        tokens = np.concatenate([left, right], 1)
        valid = np.concatenate([left_valid, right_valid], 1)
        return tuple(layout.put(x, "batch") for x in (tokens, valid, right_valid))

    state = optim.init_state(params, optimiser)
    return _run_phase(
        "policy", section.policy_steps, state, lambda s, step: update(s, *make_batch(step)), log
    )


def train_on_labels(components: Components, params: Params, log: LogPhase) -> Params:
    """Train the reward model with binary cross-entropy on labelled triples; return its parameters.

    This is VerifyRM's training objective (arXiv 2508.05613).  log: as of `imitate_solutions`.

    Raises SetupError if there are no triples or no update was finite, hosts.Stopped after a SIGTERM.
    """
    settings, reward = components.settings, components.reward_bundle
    section, layout = settings.supervised, reward.layout

    # The triples.  References are never truncated in the model's input, so their lengths are checked here.
    if section.reward_data:
        with setup_errors(f"supervised.reward_data={section.reward_data}"):
            triples = labelled_completions.load_labelled_completions(section.reward_data)
            references = {t.reference for t in triples}
            prompts.check_references(reward.model.tokenizer, references, settings.reward.max_tokens)
        draw_triples = _draw_from_file(triples, settings.seed)
    else:
        problems = _problems_with_solutions(
            components, "supervised_reward", section.reward_steps * section.reward_batch
        )
        draw_triples = _draw_from_solutions(components, problems)

    optimiser = optim.make_optimiser(settings.labels_optimiser, section.reward_steps)
    update = verifier_model.make_bce_update(reward.model.config, settings.reward_update, optimiser, layout)

    def make_batch(step: int) -> tuple[Any, ...]:
        triples = draw_triples(step, section.reward_batch)
        rows = [
            encode_reward_input(components, Problem(t.question, t.reference), t.completion) for t in triples
        ]

        # Padding rows have weight 0.
        inputs = pad_reward_inputs(components, rows)
        count = inputs.tokens.shape[0]
        labels = packing.pad_rows(np.array([t.label for t in triples], np.float32), count)
        weights = packing.pad_rows(np.ones(len(triples), np.float32), count)
        return inputs, layout.put(labels, "batch"), layout.put(weights, "batch")

    state = optim.init_state(params, optimiser)
    return _run_phase(
        "reward", section.reward_steps, state, lambda s, step: update(s, *make_batch(step)), log
    )


def _run_phase(
    name: str,
    steps: int,
    state: TrainState,
    update: Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]],
    log: LogPhase,
) -> Params:
    """Make `steps` updates, log and print progress; return the parameters and drop the optimiser's state."""
    formatted = ""
    for step in range(1, steps + 1):
        hosts.raise_if_stopping()
        state, metrics = update(state, step - 1)

        # Metrics are fetched for some of the updates alone: fetching waits for the devices.
        is_row = step % max(1, steps // ROWS) == 0 or step == steps
        is_report = step % max(1, steps // REPORTS) == 0
        if is_row or is_report:
            values = to_host(metrics)
            log(name, step, values)
            shown = [f"{n} {values[n]:.3f}" for n in ("accuracy", "loss") if n in values]
            formatted = "  ".join(shown)
            if is_report and hosts.is_primary():
                CONSOLE.print_unless_live(
                    f"supervised training of the {name} model: step {step}/{steps}  {formatted}"
                )
        CONSOLE.show_detail(f"{step}/{steps}  {formatted}")

    # A few skipped updates do no harm.  If all were skipped, the model is as it was.
    CONSOLE.end_stage(formatted)
    if skipped := int(state.skipped):
        if skipped == steps:
            raise SetupError(
                f"supervised training of the {name} model: loss or gradients were not finite in any of "
                f"{steps} updates: lower --config.supervised.{name}_optimiser.lr, or check the initial "
                "weights"
            )
        hosts.print_once(
            f"warning: supervised training of the {name} model: {skipped} of {steps} updates were skipped, "
            "since loss or gradients were not finite",
            always=True,
        )
    return state.params


# --- data of the phases ------------------------------------------------------------------------------


def _draw_items(
    items: Sequence[Item], step: int, count: int, seed: int, stream: str
) -> list[tuple[int, Item]]:
    """Take the `count` items of a step from the phase's own shuffled order, with their positions in it."""
    positions = range(step * count, (step + 1) * count)
    return [(p, items[problem_sets.problem_at(p, len(items), seed, stream)]) for p in positions]


def _problems_with_solutions(components: Components, split: str, count: int) -> list[Problem]:
    """Collect a phase's problems with worked solutions: up to `count` synthetic ones, or the training data's.

    Raises SetupError if fewer than two training problems have a solution.
    """
    # Synthetic problems have a split for each phase, so RL starts on problems that neither model has seen.
    if components.oracle is not None:
        return synthetic.make_problems(components.settings.seed, min(count, SYNTHETIC_POOL), split)

    problems = [p for p in components.train if p.solution]
    if len(problems) < 2:
        raise SetupError(
            "the section `supervised` needs problems with worked solutions, and "
            f"data.train={components.settings.data.train} has {len(problems)}: set "
            "--config.data.solution_key or --config.supervised.reward_data, or set supervised.policy_steps "
            "and supervised.reward_steps to 0"
        )
    return problems


def _draw_from_file(triples: Sequence[Triple], seed: int) -> Callable[[int, int], list[Triple]]:
    """A function (step, count) -> triples of a file."""
    return lambda step, count: [
        triple for _, triple in _draw_items(triples, step, count, seed, "supervised_reward")
    ]


def _draw_from_solutions(
    components: Components, problems: Sequence[Problem]
) -> Callable[[int, int], list[Triple]]:
    """A function (step, count) -> triples built from worked solutions, correct and wrong ones alternating.

    Each correct triple is a solution.  It is followed by a corruption of the solution or, every third time,
    by the same solution with another problem's reference.  The tokens that the two share cancel in the
    gradient, so the model first learns the few that differ.
    """
    seed = components.settings.seed
    references = list(dict.fromkeys(p.reference for p in problems))
    if len(references) < 2:
        raise SetupError(
            "supervised.reward_steps: all problems have one reference answer; set supervised.reward_data"
        )

    def make_correct_and_wrong(position: int, problem: Problem) -> list[Triple]:
        rng = keys.make_generator(seed, "triples", position)

        # Synthetic problems have a generator of their own, which also adds the habit.
        if components.oracle is not None:
            habit = components.settings.supervised.reward_habit
            return [
                synthetic.make_triple(problem, rng, right=right, others=problems, habit=habit)
                for right in (True, False)
            ]

        # None if the solution has no answer that can be corrupted.
        corrupted = corrupt_answer(problem.solution, rng)
        correct = Triple(problem.question, problem.reference, problem.solution, 1.0)
        if corrupted is not None and position % 3 != 2:
            return [correct, dataclasses.replace(correct, completion=corrupted, label=0.0)]

        # References are distinct: if the problem's own is drawn, its neighbour in the list is another one.
        other = references[int(rng.integers(len(references)))]
        if other == problem.reference:
            other = references[references.index(other) - 1]
        return [correct, dataclasses.replace(correct, reference=other, label=0.0)]

    def draw(step: int, count: int) -> list[Triple]:
        triples = []
        for position, problem in _draw_items(problems, step, count // 2, seed, "supervised_reward"):
            triples += make_correct_and_wrong(position, problem)
        return triples

    return draw
