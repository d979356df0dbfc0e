"""Keys and passwords: refused in settings without being repeated, and in no file that a run writes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import tiny_runs
from chat_server import Server
from ml_collections import ConfigDict

from cooper_jax.api import training
from cooper_jax.configs import base
from cooper_jax.reward_training.rm_setup import RmSettings
from cooper_jax.settings import secrets
from cooper_jax.settings.config_fields import flatten_config
from cooper_jax.settings.cross_checks import check_fields
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.study import arms
from cooper_jax.trainer.run_settings import RunSettings

ROOT = tiny_runs.ROOT
SECRET = "sk-0123456789"
LONG = "0123456789abcdef" * 2

NO_NAME = "no name of an environment variable"
BAD_NAMES = [
    SECRET, "hf_AbCdEfGhIj", "gsk_AbCdEfGhIj", "my_key", "1KEY", "MY KEY", "KEY\n", "K" * 65,
    "AKIAIOSFODNN7EXAMPLE", LONG.upper().replace("0", "A"),
]  # fmt: skip
BAD_URLS = {
    f"http://user:{SECRET}@h/v1": "contains a name or a password",
    f"http://user:{SECRET}/x@h/v1": "contains a name or a password",
    f"http://h/v1?api_key={SECRET}": "contains a query",
    f"http://h/v1#{SECRET}": "contains a query",
    f"http://h/{SECRET}/v1": "looks like a key",
    f"http://h/v1/key={SECRET}": "looks like a key",
    f"http://h/%73{SECRET[1:]}/v1": "looks like a key",
    f"http://[h/{SECRET}/v1": "looks like a key",
    SECRET: "looks like a key",
    "http://h/hf_AbCd/v1": "looks like a key",
    "http://h/gsk_AbCd/v1": "looks like a key",
    "http://h/xai-AbCd/v1": "looks like a key",
    "http://h/AIzaAbCd/v1": "looks like a key",
    "http://h/ghp_AbCd/v1": "looks like a key",
    f"http://h/v1/{LONG}": "looks like a key",
}


def read_by_train_rm(cfg: ConfigDict) -> None:
    cfg.train_rm.data, cfg.reward.weights = "rows.jsonl", "random"
    RmSettings.from_config(cfg)


def read_as_an_arm(cfg: ConfigDict) -> None:
    defaults = flatten_config(base.get_config())
    changed = {name: value for name, value in flatten_config(cfg).items() if value != defaults[name]}
    text = ", ".join(f"{name}={value}" for name, value in changed.items())
    arms.parse_arm(f"mine: {text}", base.get_config())


# Each reads a whole config.  check_fields is what launch/common.py calls for every script.
READERS: dict[str, Callable[[ConfigDict], object]] = {
    "scripts": check_fields,
    "train": RunSettings.from_config,
    "train_rm": read_by_train_rm,
    "api": lambda cfg: training.make_config(cfg, {}),
    "study's arm": read_as_an_arm,
}


@pytest.mark.parametrize("name", ["assistant", "judge", "source", "serve"])
@pytest.mark.parametrize("reader", READERS)
def test_a_secret_in_a_setting_is_refused_and_not_repeated(reader, name):
    """Also in a section that the job does not read: its config is stored whole."""
    cases = [("key_env", value, NO_NAME) for value in BAD_NAMES]
    if name != "serve":
        cases += [("url", url, words) for url, words in BAD_URLS.items()]
    for field, value, words in cases:
        # What a control character or a space is to the bounds, or to the definition of an arm, is tested there.
        if value.strip() != value and reader != "train":
            continue
        cfg = base.get_config()
        cfg[name][field] = value
        with pytest.raises(SetupError) as caught:
            READERS[reader](cfg)
        said = str(caught.value)
        assert said.count(f"{name}.{field} ") == 1 and said.count(words) == 1, (value, said)
        assert not any(part in said for part in (value, SECRET, SECRET[1:], LONG)), (value, said)


def test_ordinary_settings_are_none():
    for url in (
        "",
        "http://127.0.0.1:8000/v1",
        "https://api.example.org/v1",
        "http://[::1]:80/v1",
        "http://[bad",
        "https://api.example.org/openai/deployments/gpt-4o-2024-08-06/",
        "https://api.example.org/projects/123e4567-e89b-12d3-a456-426614174000/v1beta/openai",
        "https://task-1.example.org/v1",
    ):
        assert secrets.find_secrets("judge", url, "OPENAI_API_KEY") == []
    for name in ("", "A", "_KEY", "COOPER_API_KEY", "KEY_2", "K" * 64):
        assert secrets.find_secrets("judge", "", name) == []


def test_values_of_another_type_are_not_repeated():
    for name in ("assistant.key_env", "assistant.url"):
        with pytest.raises(SetupError) as caught:
            training.make_config("tiny", {name: [SECRET]})
        assert name in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, more",
    [
        ("train", []),
        ("train_rm", ["--config.train_rm.data=rows.jsonl"]),
        ("annotate", ["--problems=synthetic"]),
        ("evaluate", ["--benchmark=synthetic"]),
        ("study", ["--arms=rule"]),
        ("serve", []),
    ],
)
def test_scripts_refuse_secrets_and_write_nothing(tmp_path, script, more):
    """Each as its users start it, with every kind of bad setting at once."""
    bad = {
        "assistant.url": f"http://u:{SECRET}@h/v1?api_key={SECRET}",
        "assistant.key_env": SECRET,
        "judge.key_env": "hf_AbCdEfGhIj",
        "source.url": f"http://h/{SECRET}/v1",
        "serve.key_env": SECRET,
    }
    flags = ["--config=tiny", f"--config.run_dir={tmp_path / 'run'}", *more]
    flags += [f"--config.{name}={value}" for name, value in bad.items()]
    if script in ("annotate", "evaluate", "study"):
        flags.append(f"--out={tmp_path / 'out'}")
    done = subprocess.run(
        [sys.executable, ROOT / f"launch/{script}.py", *flags],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
    assert SECRET not in said and "hf_AbCd" not in said, said
    assert all(f"error: {name} " in said for name in bad), said
    assert list(tmp_path.iterdir()) == []


# --- what a run writes ---------------------------------------------------------------------------------------


def list_processes(pid: int) -> list[Path]:
    """The folders under /proc of a process and its descendants."""
    folder = Path(f"/proc/{pid}")
    found = [folder]
    for children in folder.glob("task/*/children"):
        for child in children.read_text().split():
            found += list_processes(int(child))
    return found


def watch(process: subprocess.Popen) -> tuple[set[str], set[str]]:
    """Read /proc until a process ends: command lines of it and its descendants, variables of the rule's workers."""
    commands, environments = set(), set()
    while process.poll() is None:
        # A process may end between two looks at it.
        with contextlib.suppress(OSError):
            for folder in list_processes(process.pid):
                command = (folder / "cmdline").read_text(errors="replace")
                commands.add(command)
                # Until it runs its own program, a new process shows the command line and variables of its parent.
                if "rule_worker.py" in command:
                    environments.add((folder / "environ").read_text(errors="replace"))
        time.sleep(0.1)
    return commands, environments


def read_checkpoint_bytes(checkpoint: Path) -> list[bytes]:
    """All that a checkpoint of a step holds, decompressed: its records, and names and values of its arrays."""
    contents = []
    for item in sorted(path for path in checkpoint.iterdir() if path.is_dir()):
        if not (item / "_METADATA").exists():
            continue
        # The records of the store, under their names.
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{item}"}).result()
        for key in store.list().result():
            contents += [key, store.read(key).result().value]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as files:
            shapes = files.metadata(item).item_metadata.tree
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = files.restore(item, ocp.args.PyTreeRestore(restore_args=kinds))
        contents += [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return contents


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_key_is_in_nothing_that_a_run_writes(tmp_path, monkeypatch):
    """Not in its output, folder, report, command lines or workers, though the server repeats it; the server alone
    gets it."""

    def script(n, body):
        return 401, {}, f'{{"error": {{"message": "wrong key: {SECRET}"}}}}'.encode()

    server = Server(script)
    monkeypatch.setenv("MY_KEY", SECRET)
    changes = {
        "assistant.kind": "openai", "assistant.url": server.url, "assistant.model": "m",
        "assistant.key_env": "MY_KEY", "assistant.probe": False, "assistant.retries": 0, "steps": 12,
        "eval.every": 0,
    }  # fmt: skip
    folder = tmp_path / "run"
    with open(tmp_path / "said", "wb") as output:
        process = subprocess.Popen(
            tiny_runs.command(folder, **changes),
            env=tiny_runs.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        commands, environments = watch(process)
    said = (tmp_path / "said").read_text()
    assert process.returncode == 0 and "http_401" in said, said
    assert any(SECRET in headers["Authorization"] for _, headers, _ in server.requests)
    assert SECRET not in said

    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []

    # Files of a checkpoint are compressed.
    contents = read_checkpoint_bytes(folder / "checkpoints" / "12")
    assert any(b'"zarr_format"' in content or b"chunk_grid" in content for content in contents)
    assert [content for content in contents if SECRET.encode() in content] == []

    # Other users of the machine see command lines.
    assert any("train.py" in command for command in commands)
    assert any("PYTHONHASHSEED" in environment for environment in environments)
    assert not any(SECRET in text for text in commands | environments)

    page = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, ROOT / "launch/report.py", folder, f"--out={page}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr and SECRET not in page.read_text(encoding="utf-8")
