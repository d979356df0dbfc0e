"""Programs that use a server: a run's assistant, TRL's trainer, verl's reward function, and 16 clients at once."""

import concurrent.futures
import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import tiny_directories
import tiny_runs
from serving_process import ServingProcess

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = [f"What is {a} plus {a + 7}?" for a in range(8)]
REFERENCES = [str(2 * a + 7) for a in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture
def served_reward(folder, monkeypatch):
    """The module examples/served_reward.py, with a served reward model: (module, server)."""
    server = ServingProcess(folder, models=("reward",), reward__max_tokens=256, serve__max_waiting_scores=64)
    try:
        server.wait_until_ready()
        monkeypatch.setenv("VERIFYRM_URL", server.url)
        monkeypatch.setenv("VERIFYRM_KEY", server.key)
        spec = importlib.util.spec_from_file_location("served_reward", ROOT / "examples/served_reward.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with module.CLIENT:
            yield module, server
    finally:
        server.close()


@pytest.mark.slow
def test_adapters_give_the_servers_scores(served_reward):
    """In TRL's form, with texts and with messages, and in verl's, for one response and for a batch."""
    module, server = served_reward
    texts = [f"The answer is {reference}." for reference in REFERENCES]
    rows = {"questions": QUESTIONS, "references": REFERENCES, "completions": texts}
    wanted = [row["score"] for row in server.http().post("/v1/score", json=rows).json()["data"]]
    assert len(set(wanted)) > 4
    columns = {"question": QUESTIONS, "reference": REFERENCES, "prompts": QUESTIONS, "trainer_state": None}
    assert module.verifyrm_reward(completions=texts, **columns) == pytest.approx(wanted, abs=1e-6)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert module.verifyrm_reward(completions=messages, **columns) == pytest.approx(wanted, abs=1e-6)

    infos = [{"question": question, "index": i} for i, question in enumerate(QUESTIONS)]
    batch = module.compute_scores(["gsm8k"] * 8, texts, REFERENCES, infos)
    assert batch == pytest.approx(wanted, abs=1e-6)
    one = module.compute_score("gsm8k", texts[3], REFERENCES[3], infos[3])
    assert one == pytest.approx(wanted[3], abs=1e-6)
    with pytest.raises(RuntimeError, match="400: .*references"):
        module.compute_score("gsm8k", "1", "9" * 2000, infos[0])

    # More than the queue takes, from several threads: a request that is refused is repeated.
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        many = list(
            threads.map(lambda _: module.verifyrm_reward(texts * 6, QUESTIONS * 6, REFERENCES * 6), range(6))
        )
    assert all(scores == pytest.approx(wanted * 6, abs=1e-6) for scores in many)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trl_trains_with_a_served_reward_model(served_reward, folder, tmp_path, monkeypatch):
    """GRPOTrainer takes two steps; its rewards are the server's scores."""
    pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    module, server = served_reward
    tiny_directories.write_model(folder / "trained", "logits")
    seen = []

    def verifyrm_reward(completions, question, reference, **kwargs):
        scores = module.verifyrm_reward(completions, question, reference, **kwargs)
        seen.append(scores)
        return scores

    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    data = datasets.Dataset.from_dict({"prompt": prompts, "question": QUESTIONS, "reference": REFERENCES})
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=12, learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", bf16=False, seed=0,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(folder / "trained" / "hf"), reward_funcs=verifyrm_reward, args=settings, train_dataset=data
    )
    trainer.train()
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    means = [sum(scores) / len(scores) for scores in seen]
    assert logged == pytest.approx(means, abs=1e-5) and len(logged) == 2
    assert server.metric("cooper_scores_total") == sum(map(len, seen)) == 16
    trainer.accelerator.free_memory()


@pytest.mark.slow
def test_a_served_run_is_the_assistant_of_another(tmp_path):
    """launch/train.py asks the policy of a finished run for rewrites: all are answered, none fails."""
    first = tmp_path / "first"
    done = tiny_runs.run(first)
    assert done.returncode == 0, done.stdout + done.stderr
    server = ServingProcess(
        tmp_path, run_dir=first, serve__max_prompt_tokens=2048, serve__max_new_tokens=640, serve__slots=8
    )
    try:
        server.wait_until_ready()
        command = tiny_runs.command(
            tmp_path / "second",
            steps=6,  # the policy solves few problems, and a prompt without a correct response asks for no rewrite
            supervised__start_from=first,
            assistant__kind="openai",
            assistant__url=server.url,
            assistant__model="policy",
            assistant__key_env="KEY_OF_THE_ASSISTANT",
            assistant__retries=0,
            eval__every=0,
        )
        environment = tiny_runs.environment() | {"KEY_OF_THE_ASSISTANT": server.key}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the server says" not in done.stdout + done.stderr
        text = httpx.get(server.address + "/metrics").text
        answered = dict(re.findall(r'cooper_requests_total\{path="(\S+)",status="200"\} (\S+)', text))
        assert float(answered["/v1/chat/completions"]) > 0
        assert set(re.findall(r'status="(\d+)"', text)) == {"200"}
        failed = [
            name for row in tiny_runs.metrics(tmp_path / "second") for name, value in row.items()
            if "assistant_" in name and value > 0
        ]  # fmt: skip
        assert failed == []

        # The reward model of the run is served, too.
        rows = {"questions": "What?", "references": "13", "completions": ["13", "14"]}
        assert len(server.http().post("/v1/score", json=rows).json()["data"]) == 2
    finally:
        server.close()


def make_mixed_request(number: int):
    """The path and the body of a request: whole, streamed, several samples, stop texts, scores, rankings."""
    draw = random.Random(number)
    content = " ".join(draw.choices(["What", "is", "3", "plus", "10", "answer"], k=draw.randint(1, 15)))
    ask = {
        "model": "policy", "messages": [{"role": "user", "content": content}], "seed": number,
        "max_tokens": draw.randint(1, 64), "temperature": draw.choice([0, 0.7, 1]), "top_p": draw.choice([0.9, 1]),
    }  # fmt: skip
    rows = {"references": "13", "completions": [content] * draw.randint(1, 12), "questions": content}
    kinds = [
        ("/v1/chat/completions", ask),
        ("/v1/chat/completions", ask | {"stream": True}),
        ("/v1/chat/completions", ask | {"n": 3, "logprobs": True}),
        ("/v1/chat/completions", ask | {"stop": ["a", "1"], "stream": True, "n": 2}),
        ("/v1/score", rows),
        ("/v1/rerank", {"query": content, "reference": "13", "documents": rows["completions"]}),
    ]
    return kinds[number % len(kinds)]


def count_answers(path: str, body: dict, response: httpx.Response) -> int:
    """The number of replies or scores in a response, which must be complete."""
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text
        return len(re.findall(r'"finish_reason":"(?:stop|length)"', response.text))
    answer = response.json()
    return len(answer.get("choices") or answer.get("data") or answer["results"])


@pytest.mark.slow
def test_200_mixed_requests_of_16_clients(folder):
    """None is lost, the same request has the same answer each time, and memory grows by less than 64 MB."""
    server = ServingProcess(folder, serve__max_waiting=64).wait_until_ready()
    try:

        def ask(number: int) -> tuple[int, str]:
            path, body = make_mixed_request(number)
            response = clients[number % 16].post(path, json=body)
            return count_answers(path, body, response), response.text

        clients = [server.http() for _ in range(16)]
        memory = []
        for _ in range(4):
            with concurrent.futures.ThreadPoolExecutor(16) as threads:
                counts = [count for count, _ in threads.map(ask, range(200))]
            wanted = []
            for number in range(200):
                _, body = make_mixed_request(number)
                wanted.append(len(body.get("completions") or body.get("documents") or []) or body.get("n", 1))
            assert counts == wanted
            for name in ("cooper_slots_busy", "cooper_replies_waiting", "cooper_scores_waiting"):
                assert server.metric(name) == 0
            memory.append(server.resident_mb())
        # The first rounds fill the allocator's pools, which grow by tens of MB at a time.  docs/serving.md states
        # this limit.
        assert max(memory[2:]) < memory[1] + 64, memory
        text = httpx.get(server.address + "/metrics").text
        assert set(re.findall(r'status="(\d+)"', text)) == {"200"}
    finally:
        server.close()


@pytest.mark.slow
def test_the_throughput_is_measured(folder):
    """tests/measure_serving.py on a tiny model, few requests: the figures are there."""
    tiny_directories.write_model(folder / "measured", "logits")
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tests/measure_serving.py"), f"--weights={folder / 'measured' / 'hf'}",
            "--requests=6", "--clients=2", "--slots=2", "--words=10", "--max_prompt_tokens=200", "--stream",
        ],
        env=tiny_runs.environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^server / engine: [\d.]+ by time, [\d.]+ by CPU time$", done.stdout, re.M), done.stdout
