"""The scores of a served VerifyRM as a reward of other trainers (docs/serving.md).

TRL:   GRPOTrainer(..., reward_funcs=verifyrm_reward), with the columns `question` and `reference`
verl:  custom_reward_function.path=examples/served_reward.py custom_reward_function.name=compute_score
       or compute_scores with reward_model.reward_manager=batch; the question is extra_info["question"]

VERIFYRM_URL is the server's address, VERIFYRM_KEY its key.
"""

import os
import time

import httpx

URL = os.environ.get("VERIFYRM_URL", "http://127.0.0.1:8000/v1")
CLIENT = httpx.Client(headers={"Authorization": f"Bearer {os.environ.get('VERIFYRM_KEY', '')}"}, timeout=600)


def request_scores(questions, references, completions):
    """The probability that each completion is correct; waits while the server's queue is full."""
    rows = {"questions": list(questions), "references": list(references), "completions": completions}
    while (response := CLIENT.post(f"{URL}/score", json=rows)).status_code == 429:
        time.sleep(float(response.headers.get("Retry-After", 1)))
    if response.is_error:
        raise RuntimeError(f"{URL}: {response.status_code}: {response.text[:300]}")
    return [row["score"] for row in response.json()["data"]]


def verifyrm_reward(completions, question, reference, **kwargs):
    """TRL's form: completions are texts, or conversations whose last message counts."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return request_scores(question, reference, texts)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """verl's form for one response."""
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info])[0]


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    """verl's form for a batch of responses."""
    questions = [info["question"] for info in extra_infos]
    return request_scores(questions, [str(truth) for truth in ground_truths], list(solution_strs))
