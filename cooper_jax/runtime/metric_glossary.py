"""Descriptions of every metric that a run or a reward model's training writes to metrics.jsonl.

docs/metrics.md is generated from the tables (`python tests/reference_pages.py --write`), and tests compare them
with what runs write.  A part of a name in capitals stands for a name that the run decides: a reward function, the
subject of a problem, a data source, the reason for which a pair was refused.

The periodic evaluation measures responses as a step does, under longer names: `eval/rule/accuracy` is
`rule/accuracy` of the held-out problems' responses, `eval/greedy/...` the same of greedy responses, and
`eval/by_source/SOURCE/...` of the problems of one source.  `describe_metric` knows these prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# heading -> name -> description
Glossary = Mapping[str, Mapping[str, str]]

# Of both glossaries.
TRACKER_FAILURES = "trackers/failures"

# "Decidable" responses are those that the rule verifier finds correct, wrong or without an answer.
RUN_METRICS: Glossary = {
    "Rewards": {
        "reward/mean": "mean reward of the step's responses",
        "reward/std": "standard deviation of the rewards over the whole step",
        "reward/zero_variance_groups": "share of groups whose rewards are all equal: they teach the "
        "policy nothing",
        "reward/flat_group_share": "share of the sum of |advantage| that comes from groups with a "
        "standard deviation below 0.05: how much of the update may be noise of the reward model",
        "reward/overlong": "mean of the part of the rewards that `reward.overlong_tokens` takes away",
        "reward/masked": "`reward.functions`: number of responses without any reward, which leave the loss",
        "reward/NAME": "`reward.functions`: mean of the function NAME, over the responses that it rewards",
        "reward/NAME/REASON": "`reward.functions`: number of its calls (exception, timeout, "
        "wrong_length, wrong_type) or of its responses (none, not_finite) without a reward",
    },
    "Rule verifier": {
        "rule/accuracy": "share of responses that the rule finds correct; abstentions count as not correct",
        "rule/wrong": "share with an answer that differs from the reference",
        "rule/no_answer": "share without a final answer",
        "rule/unrecognised": "share with an answer or a reference that the rule cannot compare (an "
        "abstention)",
        "rule/timeout": "share whose verification took too long (an abstention)",
        "rule/decidable": "share of correct, wrong and no_answer: the responses that may serve as labels",
        "rule/sampled_accuracy": "`data.refill_prompts`: `rule/accuracy` over all groups that were "
        "sampled, those that were replaced included",
    },
    "Exact truth (synthetic problems)": {
        "oracle/accuracy": "share of responses that are correct by the problem's own arithmetic; "
        "nothing is trained on it",
        "oracle/accuracy_SUBJECT": "the same for the problems of one subject (`number`, `words`)",
    },
    "Responses": {
        "response/tokens_mean": "mean length in sampled tokens",
        "response/tokens_max": "largest length in sampled tokens",
        "response/truncated": "share that reached `rollout.max_new_tokens` without an end",
    },
    "Reward model against the rule verifier": {
        "rm/mean": "mean score",
        "rm/mean_on_correct": "mean score of the responses that the rule finds correct",
        "rm/mean_on_wrong": "mean score of the decidable responses that are not correct",
        "rm/false_positive_rate": "share of the decidable responses that are not correct to which the "
        "reward model gives more than 1/2: the sign of reward hacking",
        "rm/false_negative_rate": "share of the correct responses to which it gives at most 1/2",
        "rm/rule_agreement": "share of the decidable responses on which both agree",
    },
    "Signs of reward hacking": {
        "hacking/unbacked": "mean score minus the rule's accuracy, on all responses: reward that the rule does "
        "not back",
        "hacking/gap": "mean score minus the rule's accuracy, on decidable responses",
        "hacking/auroc": "area under the ROC curve of the scores against the rule's verdicts, on decidable "
        "responses",
        "hacking/accuracy": "the rule's accuracy on decidable responses",
        "hacking/advantage_edge": "mean advantage of the correct responses minus that of the wrong ones; below 0 "
        "the policy's update raises the probability of wrong responses",
        "hacking/repeated": "share of a response's n-grams of 3 words that occurred in it before (numbers "
        "count as equal), mean over responses",
        "hacking/common": "largest share of responses that contain one and the same n-gram",
        "hacking/variety": "different n-grams as a share of all, over the step's responses",
        "hacking/anchor": "`hacking_anchor`: share of worked solutions that the reward model judges correctly, "
        "beside their own reference and beside another",
        "guard/excess": "how long and how far the guard's signals have been worse than in the run's past; an "
        "alarm above its limit ([hacked.md](hacked.md#the-guard))",
        "guard/alarm": "1 while there is an alarm",
        "guard/alarms": "number of alarms so far",
        "guard/by_rule": "1 if the guard has replaced the step's rewards by the rule's verdicts",
        "guard/frozen": "1 if the guard has left out the policy's update",
    },
    "Reward model's update": {
        "rm/loss": "the whole loss of the step's first update",
        "rm/pair_loss": "contrastive loss, mean over the valid pairs, without its weight",
        "rm/pair_bce": "cross-entropy on the members of pairs, without its weight",
        "rm/rollout_bce": "cross-entropy on labelled responses, without its weight",
        "rm/accuracy": "share of pairs whose positive has the higher logit",
        "rm/rollout_accuracy": "weighted share of labelled responses on the right side of 1/2",
        "rm/margin": "positive minus negative, mean over the pairs: of logits or of rewards, as "
        "`reward.pair_loss` says",
        "rm/positive_mean": "mean reward of the pairs' positives",
        "rm/negative_mean": "mean reward of the pairs' negatives",
        "rm/positive_saturation": "mean p (1 - p) of the positives: 0.25 undecided, 0 saturated",
        "rm/negative_saturation": "mean p (1 - p) of the negatives",
        "rm/common_push": "what gradient descent does to both logits of a pair "
        "(`cooper_jax/reward/reward_losses.py`): above 0, both rise",
        "rm/difference_push": "what it does to their difference: above 0, they move apart",
        "rm/common_motion": "`log.pair_motion`: change of the mean logit of the pairs' members by the "
        "step's updates",
        "rm/difference_motion": "`log.pair_motion`: change of positive minus negative logit",
        "rm/valid": "number of pairs in the update",
        "rm/rollout_rows": "number of labelled responses in the update",
        "rm/updates": "number of updates that were applied in this step",
        "rm/grad_norm": "global norm of the gradient, before clipping",
        "rm/lr": "learning rate of the update; 0 if nothing was applied",
        "rm/skipped": "number of updates that were left out because loss or gradient was not finite",
    },
    "Pairs": {
        "pairs/valid": "number of pairs that were made",
        "pairs/valid_share": "the same as a share of those that were asked for",
        "pairs/refused_REASON": "number of pairs that were not made, by reason (below)",
        "pairs/giveaway_auroc": "how well n-grams, length and layout alone tell the last rewrites from "
        "their positives: 0.5 not at all, 1 always (`log.giveaway_every`)",
        "pairs/giveaway_pairs": "number of rewrites in that measurement",
    },
    "Policy's update": {
        "policy/loss": "the whole loss",
        "policy/pg_loss": "its policy-gradient part",
        "policy/kl": "KL divergence from the policy of step 0 by `policy.kl_estimator`, nats per token; "
        "absent with `policy.kl_coef=0`",
        "policy/entropy": "mean entropy of the next-token distribution, nats per token",
        "policy/clip_low": "share of tokens whose ratio is clipped from below",
        "policy/clip_high": "share of tokens whose ratio is clipped from above",
        "policy/dual_clip": "share of tokens whose loss is bounded by `policy.dual_clip`",
        "policy/ratio_mean": "mean ratio of new to old probability of the sampled tokens",
        "policy/ratio_min": "smallest ratio",
        "policy/ratio_max": "largest ratio",
        "policy/advantage_mean": "mean advantage of the responses in the loss",
        "policy/advantage_abs": "mean |advantage|",
        "policy/grad_norm": "global norm of the gradient, before clipping",
        "policy/lr": "learning rate of the update",
        "policy/skipped": "updates that were left out because loss or gradient was not finite",
        "policy/padding": "share of padding in packed rows; absent where rows are not packed",
    },
    "Sampler against learner": {
        "policy/rollout_mismatch": "mean |difference| of a token's log-probability between rollout and "
        "learner, nats",
        "policy/rollout_mismatch_p50": "its median, rounded up to an edge of the histogram",
        "policy/rollout_mismatch_p99": "its 99th percentile",
        "policy/rollout_mismatch_max": "its maximum",
        "policy/rollout_ratio_min": "smallest ratio of a whole response's probability, learner over rollout",
        "policy/rollout_ratio_max": "largest such ratio",
        "policy/correction": "mean importance weight of `policy.correction`; absent without one",
        "exact/rounds": "`exact=True`: rounds of correction",
        "exact/corrected_rows": "`exact=True`: share of responses that were corrected",
        "exact/corrected_tokens": "`exact=True`: number of tokens that were replaced",
        "exact/logprob_difference": "`exact=True`: largest difference of log-probabilities that is "
        "left; 0 is exact",
    },
    "Rollout": {
        "rollout/steps": "decoding steps",
        "rollout/slot_use": "share of slot steps that decoded a token: low if few long responses kept "
        "all slots waiting",
        "rollout/imbalance": "tokens of the busiest batch shard over the mean of the shards",
    },
    "Data": {
        "data/position": "number of training problems taken so far",
        "data/epoch": "the same in passes over the data",
        "data/refill_prompts": "`data.refill_prompts`: prompts that were sampled in this step",
        "data/refill_rounds": "`data.refill_prompts`: rounds of further prompts",
        "data/replaced_groups": "`data.refill_prompts`: flat groups that were replaced",
    },
    "Evaluation": {
        "eval/problems": "number of held-out problems",
        "eval/response/habit": "synthetic problems: share of responses with the habit that the reward "
        "model has learnt to reward",
        "eval/rm_policy/accuracy": "reward model on the evaluation's responses, against exact truth",
        "eval/rm_policy/auroc": "the same as area under the ROC curve",
        "eval/rm_original/accuracy": "reward model on labelled completions like its training data "
        "(`eval.reward_rows`)",
        "eval/rm_original/auroc": "the same as area under the ROC curve",
        "eval/rm_balanced/accuracy": "reward model on labelled completions in which correctness and "
        "habit are independent",
        "eval/rm_balanced/auroc": "the same as area under the ROC curve",
        "eval/rm_balanced/by_habit": "logit that the habit adds on average: what a policy can exploit",
        "eval/rm_balanced/by_truth": "logit that correctness adds on average",
    },
    "Time": {
        "time/step": "seconds of the step, all phases included",
        "time/compile": "what of it something was traced or compiled, with the evaluation after it",
        "time/tokens_per_second": "sampled tokens over `time/step`",
        "time/rollout": "sampling; with `rollout.ahead=1` the wait for it",
        "time/score": "the reward model's scores",
        "time/rule": "waiting for verdicts",
        "time/functions": "waiting for reward functions",
        "time/logprobs": "log-probabilities of the policy and of the reference",
        "time/policy": "the policy's update",
        "time/pairs": "waiting for the assistant and making pairs",
        "time/reward": "the reward model's update",
        "time/waiting": "`time/rule`, `time/functions` and `time/pairs` together: the step waited for "
        "the host",
        "time/giveaways": "the measurement of giveaways",
        "time/eval": "the evaluation",
        "time/checkpoint": "the part of saving a checkpoint that the loop waits for; in the row of the "
        "next step",
        "time/rollout_ahead": "`rollout.ahead=1`: sampling on its own devices",
        "time/rollout_overlap": "`rollout.ahead=1`: share of it behind which the learner worked",
        "time/copy_weights": "`rollout.ahead=1`: copying the new weights to the rollout's devices",
    },
    "Trackers": {
        TRACKER_FAILURES: "calls of trackers (`log.to`) that failed, and rows that they did not get, in "
        "this start; from the first failure on",
    },
}

REWARD_TRAINING_METRICS: Glossary = {
    "Training": {
        "train_rm/loss": "binary cross-entropy of the update's rows",
        "train_rm/accuracy": "share of rows on the right side of 1/2",
        "train_rm/epoch": "passes over the training rows so far",
        "train_rm/rows": "rows of the update",
        "train_rm/tokens": "their tokens, without padding",
        "train_rm/microbatches": "microbatches of the update",
        "train_rm/padding": "share of padding in them",
        "train_rm/grad_norm": "global norm of the gradient, before clipping",
        "train_rm/lr": "learning rate of the update",
        "train_rm/skipped": "1 if the update was left out because loss or gradient was not finite",
        "time/step": "seconds of the update",
        "time/tokens_per_second": "`train_rm/tokens` over `time/step`",
        "time/eval": "seconds of the evaluation",
    },
    "Held-out rows, and `eval/SOURCE/...` for each source": {
        "eval/loss": "binary cross-entropy, nats",
        "eval/accuracy": "share of rows on the right side of 1/2",
        "eval/balanced_accuracy": "mean of the shares among right and among wrong completions",
        "eval/precision": "share of right completions among those scored above 1/2",
        "eval/recall": "share of the right completions that are scored above 1/2",
        "eval/f1": "harmonic mean of the two",
        "eval/auroc": "area under the ROC curve",
        "eval/ece": "expected calibration error",
        "eval/mean_score": "mean score",
        "eval/best": "1 if this evaluation is the best so far by `train_rm.keep_best`",
    },
    "Trackers": {TRACKER_FAILURES: RUN_METRICS["Trackers"][TRACKER_FAILURES]},
}

# The endings of pairs/refused_REASON.
REFUSAL_REASONS: Mapping[str, str] = {
    "no_positive": "no response to the prompt was correct",
    "no_wrong": "no response to the prompt was wrong and stated an answer",
    "no_other": "the step has no other reference to exchange",
    "not_wrong": "the rule verifier finds the negative correct",
    "not_right": "the rule verifier finds the positive wrong beside the answer that it states",
    "unparseable": "the negative is empty, or has no final answer",
    "unrecognised": "the rule verifier cannot compare the negative's answer",
    "rule_timeout": "the rule verifier took too long",
    "unstable_verdict": "two verdicts on the positive differ",
    "truncated": "the rewrite reached its length limit",
    "unchanged": "the rewrite is the positive",
    "refusal": "the assistant declined, or speaks of the task",
    "length": "the lengths of the two members differ by more than `pairs.length_ratio`",
    "too_long": "the text does not fit into `reward.max_tokens`",
    "giveaway_note": "the rewrite comments on the change",
    "giveaway_remark": "the rewrite marks the wrong step",
    "giveaway_admission": "the rewrite states the truth beside the mistake",
    "giveaway_markup": "the rewrite has tags or struck text that the positive lacks",
    "giveaway_special_token": "the rewrite spells out a control token",
    "giveaway_postscript": "the rewrite has prose behind the final answer, and the positive has none",
    "assistant_WHY": "the assistant gave no text: connection, timeout, http_500, nonsense, empty, "
    "malformed, too_long, exception, nothing_to_change",
}

# Prefixes of the periodic evaluation's names, the longest first.
_EVALUATION_PREFIX = re.compile(r"eval/(?:greedy/|by_source/[^/]+/)*")


def find_entry(name: str, glossary: Glossary = RUN_METRICS) -> str | None:
    """The entry of a glossary that describes a metric, as `pairs/refused_REASON`; None if there is none."""
    entries = [entry for section in glossary.values() for entry in section]
    candidates = [name]
    if glossary is RUN_METRICS:
        # Greedy responses are measured as the sampled ones: eval/greedy/response/habit is eval/response/habit.
        bare = _EVALUATION_PREFIX.sub("", name)
        candidates += [f"eval/{bare}", bare]
    else:
        # eval/SOURCE/auroc is eval/auroc of one source.
        candidates.append(re.sub(r"^eval/[^/]+/", "eval/", name))

    for candidate in candidates:
        if candidate in entries:
            return candidate
    for candidate in candidates:
        for entry in entries:
            pattern = re.sub(r"[A-Z]+", "[^/]+", entry)
            if pattern != entry and re.fullmatch(pattern, candidate):
                return entry
    return None


def describe_metric(name: str, glossary: Glossary = RUN_METRICS) -> str:
    """The description of a metric, in which a name in capitals stands for a part of the name.

    Raises KeyError for a name that the glossary does not have.
    """
    entry = find_entry(name, glossary)
    for section in glossary.values():
        if entry is not None and entry in section:
            return section[entry]
    raise KeyError(name)
