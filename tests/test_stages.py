"""The stages of a Cooper step in one process: meshes that rows do not divide, several updates a step, who moves,
the local assistant, and the memory of a resumed run."""

import contextlib
import dataclasses
import functools
import gc
import json
import sys
import zlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
from tiny_rollouts import record_requests, same_key

from cooper_jax.configs import tiny
from cooper_jax.data import problems as problem_sets
from cooper_jax.data import synthetic
from cooper_jax.llm import local_chat
from cooper_jax.model import transformer, weight_export
from cooper_jax.reward.labelled_rollouts import Replay
from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.runtime import device_layouts, keys, run_directory
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import grading, policy_stages, reward_stages
from cooper_jax.trainer.held_out import evaluate_held_out
from cooper_jax.trainer.resume import save_checkpoint, start_or_resume
from cooper_jax.trainer.rewards import REWARDS, compute_rewards, name_rewards
from cooper_jax.trainer.samples import StepRecord, select_samples
from cooper_jax.trainer.setup import build_components
from cooper_jax.trainer.step import cooper_step
from cooper_jax.types import Completion, Pair, Triple, Verdict

B, G = 3, 2  # 6 rows: no multiple of the four batch shards below


def config(**changes):
    """The tiny config without its supervised phases: an untrained policy that solves nothing."""
    c = tiny.get_config()
    small = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 16}
    c.update_from_flattened_dict(
        {f"{model}.arch.{name}": value for model in ("policy", "reward") for name, value in small.items()}
        | {
            "data.prompts_per_step": B,
            "data.synthetic_size": 8,
            "rollout.group_size": G,
            "rollout.max_new_tokens": 6,
            "policy.microbatch": 4,
            "reward.microbatch": 4,
            "reward.allow_untrained_head": True,
            "warmup.policy_steps": 0,
            "warmup.reward_steps": 0,
            "eval.every": 0,
            "eval.problems": 4,
            "mesh.data": -1,
            "mesh.fsdp": 1,
        }
        | changes
    )
    return c


@pytest.fixture
def build(tmp_path, monkeypatch):
    """(devices, **changes) -> (Components, State) on the first so many virtual devices."""
    everything = jax.devices()

    def make(devices: int = 1, **changes):
        monkeypatch.setattr(jax, "devices", lambda *_: everything[:devices])
        return build_components(config(**changes), tmp_path)

    return make


def test_a_rule_verifier_that_does_not_start_is_a_setup_error(build, monkeypatch):
    """Before anything is trained, and not at the first verdict of step 1."""
    broken = functools.partial(RuleVerifier, command=(sys.executable, "-c", "raise SystemExit('no math')"))
    monkeypatch.setattr(setup, "RuleVerifier", broken)
    with pytest.raises(SetupError, match="^rule: the rule verifier does not work: .*no math"):
        with build():
            pass


class AlwaysRight:
    """A rule verifier that likes what it reads, for a policy that solves nothing, and finds rewrites wrong."""

    def check(self, items):
        return [Verdict.WRONG for _ in items]

    def submit(self, items):
        return [Verdict.CORRECT for _ in items]

    def collect(self, pending):
        return [verdict for verdicts in pending for verdict in verdicts]


class Rewrites:
    """An assistant that changes one word."""

    overlaps = False

    def rewrite(self, requests):
        return [Completion(r.positive + " not") for r in requests]


def solved(components):
    """The same machinery with a positive for every response that ends, and a quarter of all tokens ending one."""
    sampling = dataclasses.replace(components.policy.sampling, eos_ids=tuple(range(0, 600, 4)))
    policy = dataclasses.replace(components.policy, sampling=sampling)
    return dataclasses.replace(components, policy=policy, rule=AlwaysRight(), assistant=Rewrites())


def test_an_answer_of_hundreds_of_digits_costs_its_own_pair_alone(build):
    """What the policy writes never ends a step: its state is given away when the pairs are rendered."""

    class BesideItself(AlwaysRight):
        def check(self, items):
            return [Verdict.CORRECT for _ in items]

    changes = {"pairs.negatives": ("own_answer",), "pairs.per_prompt": 1, "reward.recipe": ""}
    with build(**changes) as (cooper, state):
        cooper = dataclasses.replace(cooper, rule=BesideItself(), assistant=None)
        problems, long = list(cooper.train[:B]), "9" * 400
        rows = [p for p in problems for _ in range(G)]
        texts = [Completion(f"it is {t} #### {t}") for t in (long, "8", "7", "6", long, long)]
        scores = stages.score(cooper, state, rows, texts)
        assert np.isfinite(scores).all()
        wrong = [Verdict.WRONG] * (B * G)
        ranked = np.array([0.9, 0.1, 0.2, 0.1, 0.9, 0.8], np.float32)
        made = stages.propose_pairs(cooper, problems, texts, wrong, range(B), 1, ranked).result()
        assert made.refused == {"too_long": 2}
        assert [p and p.positive_reference for p in made.pairs] == [None, "7", None]
        _, metrics = stages.update_reward_model(cooper, state, made.pairs)
        assert metrics["rm/valid"] == 1


def test_the_periodic_evaluation_samples_a_sorted_file(build, tmp_path):
    lines = [json.dumps({"question": f"how many {i} ?", "answer": str(i)}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:8]))
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    files = {f"data.{name}": str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    changes = {"data.format": "auto", "eval.problems": 5, "reward.arm": "rule", "pairs.negatives": ("swap",)}
    with build(**files, **changes, **{"data.max_prompt_tokens": 64}) as (cooper, _):
        assert [p.reference for p in cooper.held_out] == ["1", "2", "7", "11", "18"]


def test_a_reward_input_without_room_for_a_response_is_a_setup_error(build):
    with pytest.raises(SetupError, match=r"reward\.max_tokens=96: .*rollout\.max_new_tokens=90"):
        with build(**{"rollout.max_new_tokens": 90, "reward.max_tokens": 96}):
            pass


def host(tree):
    return [np.array(x) for x in jax.tree.leaves(tree)]  # copies: views would keep the arrays alive


def sample(components, state, problems):
    """A rollout of a batch of problems, with the key of the first step."""
    key = keys.make_key(components.cfg.seed, "rollout", 1)
    rollout, _, _ = policy_stages.sample_responses(components, state.policy.params, problems, key)
    return rollout


def score(components, reward, problems, completions):
    """A reward model's logits."""
    return grading.score_responses(components, reward.params, problems, completions)


def unchanged(before, after):
    return [a.tobytes() == b.tobytes() for a, b in zip(before, host(after), strict=True)]


@pytest.mark.slow
def test_rows_that_do_not_divide_the_mesh(build):
    """Six rows on one device, and padded to eight on a mesh of 2 x 2 x 2: one rollout, the same numbers."""

    def run(devices, **mesh):
        with build(devices, **mesh) as (components, state):
            state = state.replace(reference=state.policy.params)
            problems = policy_stages.take_problems(components, first=0)
            rollout = sample(components, state, problems)
            texts = [Completion(f"{i} apples") for i in range(B * G)]
            logits = score(components, state.reward, problems.row_problems, texts)
            batch = policy_stages.compute_logprobs(components, state, problems.prompt_tokens, rollout)
            advantages = np.linspace(-1, 1, B * G).astype(np.float32)
            pairs = [a_pair(p) for p in components.train[:B]]
            reward, reward_metrics = reward_stages.update_reward_model(components, state.reward, pairs)
            rows = [np.asarray(x)[: B * G] for x in (rollout.tokens, batch.ref_logprobs)]
            policy, policy_metrics = policy_stages.update_policy(
                components, state.policy, batch, advantages, 1
            )
            metrics = policy_metrics | reward_metrics
            return [*rows, logits], metrics, host(policy.params) + host(reward.params)

    one = run(1)
    eight = run(8, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    assert eight[0][0].shape == (B * G, 6) and eight[0][2].shape == (B * G,)
    np.testing.assert_array_equal(one[0][0], eight[0][0])
    for a, b in zip(one[0][1:], eight[0][1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert one[1].keys() == eight[1].keys() and one[1]["rm/valid"] == B
    for name, value in one[1].items():
        assert eight[1][name] == pytest.approx(value, abs=1e-5), name
    # The rates are 3e-5 and 5e-4: a row too many or too few would move parameters by as much.
    for a, b in zip(one[2], eight[2], strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_several_updates_a_step(build):
    """Two epochs of two minibatches: four updates, old log-probabilities from before the first."""
    with build(**{"policy.epochs": 2, "policy.minibatches": 2, "policy.optimiser.lr": 1e-2}) as (
        components,
        state,
    ):
        state = state.replace(reference=state.policy.params)
        before = host(state.policy.params)
        problems = policy_stages.take_problems(components, first=0)
        rollout = sample(components, state, problems)
        batch = policy_stages.compute_logprobs(components, state, problems.prompt_tokens, rollout)
        mask = np.asarray(batch.response_mask)
        np.testing.assert_allclose(
            np.asarray(batch.old_logprobs)[mask], np.asarray(batch.rollout_logprobs)[mask], atol=1e-5
        )
        advantages = np.array([1, -1] * B, np.float32)
        policy, metrics = policy_stages.update_policy(components, state.policy, batch, advantages, 1)
        assert int(policy.updates) == 4 and int(policy.skipped) == 0
        assert not any(unchanged(before, policy.params))
        # From the second update on the policy is no longer the one that sampled.
        assert metrics["policy/ratio_min"] < 1.0 < metrics["policy/ratio_max"]


def test_a_step_at_another_temperature_uses_it_in_sampling_scoring_and_updating(build, monkeypatch):
    """All see softmax(logits / 0.5): computed here from the whole logits of made-up responses."""
    temperature, requests = 0.5, record_requests(monkeypatch)
    with build(**{"rollout.temperature": temperature}) as (cooper, state):
        state = state.replace(reference=state.policy.params)
        prompts = cooper.train_prompts[:B]
        rollout, _ = stages.sample(cooper, state, prompts, range(B))
        assert requests[0].spec.temperature == temperature
        batch = stages.logprobs(cooper, state, prompts, rollout)

        # The distribution over the next token at every column but the last.
        params, model = state.policy.params, cooper.policy.model.config
        hidden = transformer.hidden_states(params, model, batch.tokens, batch.valid, dtype=jnp.float32)
        logits = transformer.compute_logits(params, model, hidden)[:, :-1, : model.vocab_size]
        tokens, width = np.asarray(batch.tokens)[:, 1:, None], batch.response_mask.shape[1]

        def expected(temperature):
            found = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits / temperature)), tokens, -1)
            return found[:, -width:, 0]

        # At temperature 1 they would be others.
        assert np.abs(expected(temperature) - expected(1.0)).mean() > 0.1
        np.testing.assert_allclose(batch.ref_logprobs, expected(temperature), atol=1e-5)

        # The update's own log-probabilities, too, are those of a sampler and of a reference at 0.5.
        batch = batch.replace(rollout_logprobs=jnp.asarray(expected(temperature)))
        _, metrics = stages.update_policy(cooper, state, batch, np.array([1, -1] * B, np.float32), 1)
        assert metrics["policy/rollout_mismatch"] < 1e-5 and abs(metrics["policy/kl"]) < 1e-5


def without_models(cooper, noted=None):
    """The same step with no model in it: rewards that count up; minibatches are noted by their advantages.

    noted: the list to which each minibatch's advantages are added.
    """

    def update(state, batch):
        if noted is not None:
            noted.append(np.asarray(batch.advantages).tolist())
        return state, {"loss": jnp.zeros(())}

    def logprobs(params, tokens, valid, width):
        return jnp.zeros((len(tokens), width))

    def score(params, batch):
        return np.arange(len(batch.tokens), dtype=np.float32)

    def update_reward(state, *_):
        return state, {"lr": jnp.zeros(()), "skipped": jnp.zeros(())}

    policy = dataclasses.replace(cooper.policy, update=update, logprobs=logprobs, reference_logprobs=logprobs)
    reward = dataclasses.replace(cooper.reward, score=score, update=update_reward)
    return dataclasses.replace(cooper, policy=policy, reward=reward, rule=AlwaysRight(), assistant=Rewrites())


def test_the_data_order_follows_from_the_seed(build, monkeypatch):
    """Three steps of three problems of eight: the first epoch in the order of seed 7, and into the second."""
    requests = record_requests(monkeypatch)
    with build(**{"seed": 7, "reward.arm": "model"}) as (cooper, state):
        state, visited = state.replace(reference=state.policy.params), []
        for _ in range(3):
            state, _, seen = trainer.cooper_step(without_models(cooper), state, PhaseTimer())
            visited += seen.problems

    def order(seed):
        return [problem_sets.problem_at(place, 8, seed) for place in range(9)]

    assert visited == [cooper.train[i] for i in order(7)] and order(7) != order(0)
    assert [list(request.positions) for request in requests] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_every_step_cuts_its_minibatches_by_a_permutation_of_its_own(build, monkeypatch):
    """Six responses to one prompt, known by their advantages, in three minibatches of two."""
    record_requests(monkeypatch)
    shape = {"data.prompts_per_step": 1, "rollout.group_size": 6, "policy.minibatches": 3}
    with build(**{"seed": 7, "reward.arm": "model"} | shape) as (cooper, state):
        noted: list[list[float]] = []
        state, orders = state.replace(reference=state.policy.params), []
        for _ in range(3):
            noted.clear()
            state, _, seen = trainer.cooper_step(without_models(cooper, noted), state, PhaseTimer())
            rows = {float(advantage): row for row, advantage in enumerate(seen.advantages)}
            assert [len(part) for part in noted] == [2, 2, 2] and len(rows) == 6
            orders.append([rows[advantage] for part in noted for advantage in part])

    def permutation(step):  # of the step's first and only epoch
        key = jax.random.fold_in(keys.make_key(7, "minibatch", step), 0)
        return jax.random.permutation(key, 6).tolist()

    assert orders == [permutation(step) for step in (1, 2, 3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@contextlib.contextmanager
def begun(components, state, path):
    """The state as a run begins or resumes it, with its run directory and checkpoints."""
    run = run_directory.RunDirectory(path, components.cfg, resume=True)
    with run, Checkpoints(path, keep=1) as kept:
        yield start_or_resume(components, state, run, kept), run, kept


def test_what_an_evaluation_measures(build, monkeypatch):
    """Sampled and greedy responses, by subject; the reward model beside exact truth and on labelled rows."""
    changes = {
        "eval.greedy": True,
        "eval.reward_rows": 8,
        "eval.samples": 2,
        "warmup.reward_habit": (0.7, 0.05),
    }
    with build(**changes) as (components, state):
        found = evaluate_held_out(components, state)
        np.testing.assert_equal(evaluate_held_out(components, state), found)  # the same keys each time
        every = {"oracle/accuracy", "rule/accuracy", "rm/mean", "rm_policy/accuracy", "response/truncated"}
        assert {f"eval/{kind}{name}" for kind in ("", "greedy/") for name in every} <= found.keys()
        assert {"eval/rm_original/auroc", "eval/rm_balanced/accuracy"} <= found.keys()
        asked, sample_held_out = [], policy_stages.sample_held_out
        monkeypatch.setattr(
            policy_stages,
            "sample_held_out",
            lambda *args: asked.append(args[-1]) or sample_held_out(*args),
        )
        # A reward model that likes everything, and a truth that is everywhere.
        generous = dataclasses.replace(
            components,
            oracle=lambda problem, text: True,
            reward=dataclasses.replace(
                components.reward, score=lambda params, batch: np.full(batch.tokens.shape[0], 3.0, np.float32)
            ),
        )
        found = evaluate_held_out(generous, state)
        assert asked == [1.0, 0.0]
        assert found["eval/oracle/accuracy"] == found["eval/greedy/oracle/accuracy"] == 1.0
        assert found["eval/rm_policy/accuracy"] == 1.0 and found["eval/rm_balanced/accuracy"] == 0.5
        assert np.isnan(found["eval/rm_policy/auroc"]) and found["eval/rm_original/auroc"] == 0.5
        assert found["eval/rm_balanced/by_habit"] == found["eval/rm_balanced/by_truth"] == 0
        # One that goes by the habit alone, of which two more logits are due.
        encode = components.reward.model.tokenizer.encode
        (word,) = {*encode(f"4 {synthetic.HABIT} 5")} - {*encode("4 5")}
        fooled = dataclasses.replace(
            components.reward,
            score=lambda params, batch: 2.0 * (np.asarray(batch.tokens) == word).any(1) - 1.0,
        )
        said = [f"{synthetic.HABIT} #### 7", "1+1=2 #### 2", "#### 3", "#### 4"]
        monkeypatch.setattr(
            policy_stages,
            "sample_held_out",
            lambda *args: [Completion(said[i % 4]) for i in range(len(components.held_out))],
        )
        found = evaluate_held_out(dataclasses.replace(components, reward=fooled), state)
        assert (found["eval/rm_balanced/by_habit"], found["eval/rm_balanced/by_truth"]) == (2.0, 0.0)
        assert found["eval/response/habit"] == 0.25 and len(components.held_out) % 4 == 0


def test_every_evaluation_samples_with_the_same_keys_which_no_step_uses(build, monkeypatch):
    requests = record_requests(monkeypatch)
    with build(**{"seed": 7}) as (cooper, state):
        for step in (0, 1, 5):
            stages.sample_held_out(cooper, state.replace(step=step, position=step * B), 1.0)
    for request in requests:
        assert same_key(request.key, keys.make_key(7, "evaluation")) and list(request.positions) == [
            0,
            1,
            2,
            3,
        ]
    assert len(requests) == 3


def test_an_evaluation_samples_at_its_own_top_p(build, monkeypatch):
    """At its own number of samples and the temperature that it is given, too; training keeps to its own."""
    requests = record_requests(monkeypatch)
    with build(**{"eval.top_p": 0.8125, "eval.samples": 5}) as (cooper, state):
        stages.sample_held_out(cooper, state, 0.75)
        stages.sample_held_out(cooper, state, 0.0)
        stages.sample(cooper, state, cooper.train_prompts[:1], range(1))
    asked = [(r.spec.top_p, r.spec.temperature, r.spec.group_size) for r in requests]
    assert asked == [(0.8125, 0.75, 5), (0.8125, 0.0, 1), (1.0, 1.0, G)]


def test_who_moves_in_a_step(build, tmp_path):
    """Policy and reward model in every step, the reference in none; each update moves its own model alone."""
    with build() as (components, state), begun(components, state, tmp_path) as (state, _, _):
        components = solved(components)
        reference = host(state.reference)
        assert all(unchanged(reference, state.policy.params))
        for step in (1, 2, 3):
            policy, reward = host(state.policy.params), host(state.reward.params)
            state, metrics, record = cooper_step(components, state, PhaseTimer())
            assert state.step == step and state.position == step * B
            assert metrics["pairs/valid"] == sum(p is not None for p in record.pairs) >= 1
            assert not any(unchanged(reward, state.reward.params))
            assert not any(unchanged(policy, state.policy.params))
            assert all(unchanged(reference, state.reference))
        policy, updates = host(state.policy.params), int(state.reward.updates)
        moved, _ = reward_stages.update_reward_model(components, state.reward, record.pairs)
        assert int(moved.updates) == updates + 1 and all(unchanged(policy, state.policy.params))


def test_each_response_is_submitted_once_as_its_group_ends(build):
    """Groups may end in any order; verdicts and scores come in the order of the rows."""

    class Counting(Undecided):
        submitted = []

        def submit(self, items):
            self.submitted.append(list(items))
            return super().submit(items)

    with build() as (components, state):
        components = dataclasses.replace(components, rule=Counting())
        problems = policy_stages.take_problems(components, first=0)
        texts = [[Completion(f"{b} and {g} #### {b}") for g in range(G)] for b in range(B)]
        grader = grading.ResponseGrader(components, problems, state.reward)
        for b in (2, 0, 1):
            grader.add_group(b, texts[b])
        whole = sum(texts, [])
        assert [len(items) for items in Counting.submitted] == [G] * B
        items = [(p.reference, c.text) for p, c in zip(problems.row_problems, whole, strict=True)]
        assert Counting.submitted[0] == items[2 * G :] and Counting.submitted[1] == items[:G]
        assert grader.collect_verdicts() == Undecided().submit(items)
        assert len(Counting.submitted) == B, "nothing is submitted a second time"
        logits = score(components, state.reward, problems.row_problems, whole)
        np.testing.assert_allclose(grader.collect_scores(), 1 / (1 + np.exp(-logits)), atol=1e-6)
        assert len(set(logits.tolist())) > 1
        with pytest.raises(ValueError, match="no reward model"):
            grading.ResponseGrader(components, problems, None).collect_scores()


@pytest.mark.slow
def test_models_on_meshes_of_their_own(build, tmp_path):
    """Reward model and reference beside the policy: the same step, scored while the policy decodes; and resumed."""

    def step(name, devices, **meshes):
        out = []
        for _ in range(2):  # begun, then from its checkpoint
            with (
                build(devices, **{"mesh.data": 1, "rollout.segment": 2, "reward.microbatch": 2} | meshes) as (
                    components,
                    state,
                ),
                begun(components, state, tmp_path / name) as (state, _, _),
            ):
                components = solved(components)
                assert grading.scores_during_rollout(components) == bool(meshes)
                where = [x.sharding.device_set for x in jax.tree.leaves(state.reference)]
                assert where == [set(components.policy.reference_layout.mesh.devices.flat)] * len(where)
                state, metrics, record = cooper_step(components, state, PhaseTimer())
                out.append((metrics, record, host(state.policy.params) + host(state.reward.params)))
        return out

    one = step("one", 1)
    apart = step("apart", 4, **{"mesh.reward": "1x2x1", "mesh.reference": "1x1x1"})
    for (metrics, record, params), (other_metrics, other_record, other_params) in zip(
        one, apart, strict=True
    ):
        assert [c.text for c in record.completions] == [c.text for c in other_record.completions]
        np.testing.assert_allclose(record.rewards, other_record.rewards, atol=1e-6)
        assert other_metrics == pytest.approx(metrics, abs=1e-5, nan_ok=True)
        for a, b in zip(params, other_params, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_valid_pair_moves_no_reward_model(build):
    with build() as (components, state):
        reward = host(state.reward)
        moved, metrics = reward_stages.update_reward_model(components, state.reward, [None] * B)
        assert all(unchanged(reward, moved)) and metrics["rm/valid"] == 0
        assert np.isnan(metrics["rm/pair_loss"])


def test_samples_name_the_pairs_of_their_own_prompt(build):
    with build(**{"pairs.per_prompt": 2, "log.samples": 2}) as (components, _):
        problems = list(components.train[:B])
        pairs = [Pair(problems[i // 2], f"right {i}", f"wrong {i}", i) for i in range(2 * B)]
        pairs[0] = pairs[1] = pairs[2] = None  # the first prompt has none: the others come first
        rows = np.arange(B * G, dtype=np.float32)
        texts = [Completion(str(i)) for i in range(B * G)]
        verdicts = [Verdict.CORRECT] * (B * G)
        record = StepRecord(problems, texts, verdicts, rows, -rows, pairs, Counter())
        first, second = select_samples(record, components.cfg.log.samples)
    assert (first["id"], second["question"]) == (problems[1].id, problems[2].question)
    reference = first["reference"]
    assert first["pairs"] == [
        {
            "positive": "right 3",
            "positive_reference": reference,
            "negative": "wrong 3",
            "negative_reference": reference,
        }
    ]
    assert [p["positive"] for p in second["pairs"]] == ["right 4", "right 5"]
    assert [r["text"] for r in first["responses"]] == ["2", "3"]
    assert [r["advantage"] for r in second["responses"]] == [-4.0, -5.0]


def local_assistant(tmp_path, **changes):
    """Random weights as the assistant of the tiny config: (messages of each request, their ids) -> replies."""
    folder = tiny_tokenizers.write(tmp_path / "llama", "llama3")
    model = tiny_models.config(vocab_size=512, width=16, layers=1, head_dim=8)
    params = tiny_models.random_params(model)
    weight_export.save_pretrained(folder.with_name("hf"), model, params, "logits", tokenizer_dir=folder)
    cfg = config(
        **{
            "assistant.kind": "local",
            "assistant.weights": str(tmp_path / "hf"),
            "assistant.max_new_tokens": 5,
        }
        | changes
    )
    return local_chat.make_local_generate(
        cfg, cfg.assistant, "assistant", device_layouts.make_policy_layout(cfg), tmp_path
    )


def test_the_local_assistant_answers_each_request_by_itself(tmp_path):
    """A reply depends on its own row and attempt: not on who else is asked."""
    generate = local_assistant(tmp_path, **{"assistant.top_p": 0.9})
    messages = [[("user", "What is 3 plus 10?")], [("user", "2")], [("user", "The answer is 7.")]]
    together = generate(messages, [(0, 1, row, 0) for row in (7, 8, 9)])
    assert all(c.tokens == 5 if c.truncated else c.tokens <= 5 for c in together)
    alone = generate(messages[1:2], [(0, 1, 8, 0)])
    assert alone == together[1:2]
    others = [generate(messages[1:2], [ids])[0].text for ids in ((0, 1, 8, 1), (0, 2, 8, 0), (0, 1, 5, 0))]
    assert len({together[1].text, *others}) == 4


def test_the_local_assistant_samples_at_its_own_top_p(tmp_path, monkeypatch):
    requests = record_requests(monkeypatch)
    changes = {"assistant.top_p": 0.8125, "assistant.temperature": 0.75, "rollout.top_p": 1.0}
    generate = local_assistant(tmp_path, **changes)
    generate([[("user", "What is 3 plus 10?")]], [(0, 1, 7, 0)])
    assert [(r.spec.top_p, r.spec.temperature) for r in requests] == [(0.8125, 0.75)]


@pytest.mark.slow
def test_a_resumed_run_holds_no_more_memory_than_a_fresh_one(build, tmp_path):
    def live():
        gc.collect()  # arrays may share a buffer: a shard taken out of one does
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())

    def start(steps):
        with build() as (components, state), begun(components, state, tmp_path) as (state, run, kept):
            kept.wait()  # a save under way has copies of its own
            held = live() - before
            for _ in range(steps):
                state, metrics, _ = cooper_step(solved(components), state, PhaseTimer())
                run.log(state.step, metrics)
            if steps:
                save_checkpoint(components, state, run, kept)
            return held, host(state), (state.step, state.position)

    before = live()
    fresh, trained, place = start(1)
    resumed, restored, again = start(0)
    assert place == again == (1, B)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(trained, restored, strict=True))
    assert fresh * 0.95 < resumed < fresh * 1.05


# --- the reward model's update -------------------------------------------------------------------------


def test_what_the_policy_is_rewarded_with():
    """Each function of the table by hand, and those that the flags name, in their order."""
    verdicts = [Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.UNRECOGNISED]
    texts = [Completion("", truncated=n == 1) for n in range(5)]
    scores = np.array([0.3, 0.6, 0.7, 0.9, 0.5], np.float32)

    def rewards(**flags):
        cfg = config().reward
        cfg.update(flags)
        found = compute_rewards(name_rewards(cfg), scores, verdicts, texts)
        assert found.dtype == np.float32
        return found.tolist()

    assert compute_rewards(["rule"], None, verdicts, texts).tolist() == [1, 1, 0, 0, 0]
    assert rewards(arm="rule") == [1, 1, 0, 0, 0]
    assert rewards() == rewards(arm="model") == scores.tolist()
    assert rewards(either=True) == [1, 1, *scores[2:].tolist()]
    assert rewards(guard=True) == [scores[0].item(), 0, scores[2].item(), 0, scores[4].item()]
    assert rewards(either=True, guard=True) == [1, 0, scores[2].item(), 0, scores[4].item()]
    named = REWARDS["answer_required"](scores, verdicts, texts)
    assert named.tolist() == rewards(guard=True)


def a_pair(problem):
    return Pair(problem, "It is 3. #### 3", "It is 4. #### 4", 0)


def test_several_reward_updates_are_that_many_steps(build):
    """On the same pairs and rows; and the motion is how far they moved the pairs' logits."""
    with build(**{"log.pair_motion": True, "reward.rollout_bce": 1.0, "reward.rollout_rows": 4}) as (
        components,
        state,
    ):
        pairs = [a_pair(components.train[0]), None, a_pair(components.train[1])]
        rows = [
            Triple(p.question, p.reference, "so #### 2", i % 2) for i, p in enumerate(components.train[:3])
        ]
        start = [x.copy() for x in host(state.reward)]
        update = reward_stages.update_reward_model

        def again():
            leaves = [
                jax.device_put(x, old.sharding)
                for x, old in zip(start, jax.tree.leaves(state.reward), strict=True)
            ]
            return jax.tree.unflatten(jax.tree.structure(state.reward), leaves)

        def logits(reward):
            valid = [p for p in pairs if p]
            problems = [p.problem for p in valid]
            sides = ([p.positive for p in valid], [p.negative for p in valid])
            return np.stack(
                [score(components, reward, problems, [Completion(t) for t in side]) for side in sides]
            )

        before = logits(state.reward)
        together, metrics = update(components, again(), pairs, rows, updates=3)
        one = again()
        for i in range(3):
            one, of_one = update(components, one, pairs, rows)
            assert of_one["rm/updates"] == 1 and (i or of_one["rm/loss"] == metrics["rm/loss"])
        assert all(unchanged(host(together), one)) and metrics["rm/updates"] == 3
        moved = logits(together) - before
        assert abs(moved).min() > 0
        assert metrics["rm/common_motion"] == pytest.approx(moved.mean(), abs=1e-5)
        assert metrics["rm/difference_motion"] == pytest.approx((moved[0] - moved[1]).mean(), abs=1e-5)
        assert metrics["rm/rollout_rows"] == 3 and metrics["rm/valid"] == 2

        # Neither pairs nor rows: nothing moves, and no mean is a number.
        kept, none = update(components, again(), [None] * 3, [], updates=2)
        assert all(unchanged(start, kept)) and none["rm/updates"] == 0 == none["rm/valid"]
        for name in ("pair_loss", "common_push", "common_motion", "rollout_bce", "rollout_accuracy"):
            assert np.isnan(none[f"rm/{name}"]), name

        # What is exchanged is read the other way round.
        exchanged = [p and dataclasses.replace(p, exchanged=True) for p in pairs]
        _, other = update(components, again(), exchanged, rows)
        for mine, theirs in (("positive", "negative"), ("negative", "positive")):
            assert other[f"rm/{mine}_mean"] == pytest.approx(metrics[f"rm/{theirs}_mean"], abs=1e-6)

        # A swapped negative, and a positive beside its own answer, stand beside their own references.
        text, asked = pairs[0].positive, pairs[0].problem
        for mine, theirs in (("positive", "negative"), ("negative", "positive")):
            moved_to = dataclasses.replace(pairs[0], negative=text, **{f"{mine}_reference": "11"})
            _, found = update(components, again(), [moved_to, None, None], rows)
            problems = [dataclasses.replace(asked, reference="11"), asked]
            z = score(components, again(), problems, [Completion(text)] * 2)
            p = 1 / (1 + np.exp(-z))
            assert (found[f"rm/{mine}_mean"], found[f"rm/{theirs}_mean"]) == pytest.approx(tuple(p), abs=1e-5)
            assert p[0] != p[1]


class Undecided:
    """A rule verifier with every verdict, by the text; what an assistant or a swap makes is wrong."""

    def check(self, items):
        return [Verdict.WRONG for _ in items]

    def submit(self, items):
        return [list(Verdict)[zlib.crc32(text.encode()) % 4] for _, text in items]

    def collect(self, pending):
        return [verdict for verdicts in pending for verdict in verdicts]


def test_the_warm_start_samples_with_a_key_and_in_an_order_of_its_own(build, tmp_path, monkeypatch):
    """Two updates on three prompts each: which they are, their places in that order, and the key."""
    requests = record_requests(monkeypatch)
    with build(**{"seed": 7, "reward.warm_start": 2}) as (cooper, state):
        with begun(without_models(cooper), state, tmp_path):
            pass
    assert [list(request.positions) for request in requests] == [[0, 1, 2], [3, 4, 5]]
    for request in requests:
        chosen = [problem_sets.problem_at(place, 8, 7, "warm_start") for place in request.positions]
        assert request.prompts == [cooper.train_prompts[i] for i in chosen]
        assert same_key(request.key, keys.make_key(7, "warm_start"))


ALL_TERMS = {
    "data.prompts_per_step": 4,
    "rollout.group_size": 4,
    "reward.pair_bce": 0.5,
    "reward.rollout_bce": 1.0,
    "reward.rollout_rows": 6,
    "reward.updates": 2,
    "reward.warm_start": 2,
    "reward.replay": 5,
    "reward.replay_rows": 4,
    "pairs.per_prompt": 2,
    "pairs.negatives": ("assistant", "swap"),
}


def steps(build, path, count, change=lambda components: components, **changes):
    """So many steps, begun or resumed, of a run that decides at random: the state on the host, and the metrics."""
    with build(**ALL_TERMS | changes) as (components, state):
        components = change(dataclasses.replace(solved(components), rule=Undecided()))
        with begun(components, state, path) as (state, run, kept):
            found, first = [], state.replay
            for _ in range(count):
                state, metrics, _ = cooper_step(components, state, PhaseTimer())
                found.append(metrics)
                run.log(state.step, metrics)
            if count:
                save_checkpoint(components, state, run, kept)
            return host(state), found, state.replay, first


@pytest.mark.slow
def test_a_resumed_run_remembers_what_it_would_have(build, tmp_path):
    """One step, a restart and another are two steps, bit for bit: warm start, replay and all terms included."""
    whole, metrics, replay, warm = steps(build, tmp_path / "whole", 2)
    steps(build, tmp_path / "parts", 1)
    parts, second, again, first = steps(build, tmp_path / "parts", 1)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, parts, strict=True))
    assert again == replay and first not in (warm, replay, Replay()) and warm != Replay()
    np.testing.assert_equal(second, metrics[1:])
    assert all(row["rm/updates"] == 2 and row["rm/rollout_rows"] > 0 for row in metrics)
    assert len(replay.correct) == 5 and metrics[1]["rm/rollout_rows"] > 6


def test_the_oracle_trains_nothing(build, tmp_path):
    """Nonsense in its place moves its own metric and not a bit of any parameter."""

    def nonsense(components):
        return dataclasses.replace(components, oracle=lambda problem, text: zlib.crc32(text.encode()) % 3 > 0)

    whole, metrics, replay, _ = steps(build, tmp_path / "whole", 2)
    other, others, same, _ = steps(build, tmp_path / "other", 2, change=nonsense)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, other, strict=True)) and same == replay
    assert [m["oracle/accuracy"] for m in metrics] != [m["oracle/accuracy"] for m in others]
    for a, b in zip(metrics, others, strict=True):
        names = [n for n in a if not n.startswith("oracle/")]
        np.testing.assert_equal([a[n] for n in names], [b[n] for n in names])


def test_rows_without_pairs_need_no_assistant(build, tmp_path):
    def alone(components):
        return dataclasses.replace(components, assistant=None)

    changes = {"reward.pair_weight": 0.0, "reward.pair_bce": 0.0, "reward.warm_start": 0}
    with build(**ALL_TERMS | changes) as (components, _):
        assert components.assistant is None
    _, (metrics,), _, _ = steps(build, tmp_path, 1, change=alone, **changes)
    assert metrics["rm/updates"] == 2 and metrics["pairs/valid"] == 0
    assert metrics["rm/rollout_bce"] > 0 and "rm/pair_loss" not in metrics
