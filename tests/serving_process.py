"""launch/serve.py in a process of its own, on tiny random models."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import tiny_directories
import tiny_runs

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-of-the-tests"
# Few and small programs.
SIZES = {
    "serve.port": 0,
    "serve.slots": 4,
    "serve.max_prompt_tokens": 128,
    "serve.max_new_tokens": 64,
    "serve.segment": 8,
    "reward.max_tokens": 512,
}


class ServingProcess:
    """A server and what it prints.  `folder` gets the models, unless they are given."""

    def __init__(self, folder: Path, models=("policy", "reward"), key: str = KEY, **changes):
        flags = SIZES | {name.replace("__", "."): value for name, value in changes.items()}
        for name, head in (("policy", "logits"), ("reward", "score")):
            if name in models and f"{name}.weights" not in flags and "run_dir" not in flags:
                if not (folder / name / "hf").exists():
                    tiny_directories.write_model(folder / name, head)
                flags[f"{name}.weights"] = folder / name / "hf"
        run_dir = flags.pop("run_dir", None)
        command = [sys.executable, str(ROOT / "launch/serve.py")]
        command += [] if run_dir is None else [f"--run_dir={run_dir}"]
        command += [f"--config.{name}={value}" for name, value in flags.items()]
        environment = tiny_runs.environment() | {"COOPER_API_KEY": key}
        self.key, self.lines, self._clients = key, [], []
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_until_ready(self) -> ServingProcess:
        """Wait for the line that tells the address."""
        while not (found := re.search(r"ready: (http://\S+)/v1 ", self.text)):
            assert self.process.poll() is None, self.text
            time.sleep(0.1)
        self.address = found[1]
        self.url = f"{self.address}/v1"
        return self

    def client(self, **options) -> openai.OpenAI:
        """OpenAI's client; it does not repeat refused requests by itself."""
        client = openai.OpenAI(**({"base_url": self.url, "api_key": self.key, "max_retries": 0} | options))
        self._clients.append(client)
        return client

    def http(self) -> httpx.Client:
        """A plain client with the key."""
        headers = {"Authorization": f"Bearer {self.key}"}
        client = httpx.Client(base_url=self.address, headers=headers, timeout=60)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        """Close all connections."""
        while self._clients:
            self._clients.pop().close()

    def metric(self, name: str) -> float:
        """A metric without labels."""
        text = httpx.get(f"{self.address}/metrics").text
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has a value, for a minute at most."""
        deadline = time.monotonic() + 60
        while (found := self.metric(name)) != value:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def close(self) -> None:
        self.close_clients()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
