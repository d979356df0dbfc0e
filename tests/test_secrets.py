"""Keys and passwords: refused in settings without being repeated, and in no file that a run writes."""

from __future__ import annotations

import pytest
import tiny_runs
from chat_server import Server

from cooper_jax.configs import base
from cooper_jax.settings import secrets
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.run_settings import RunSettings

SECRET = "sk-0123456789"


@pytest.mark.parametrize(
    "url, key_env, words",
    [
        ("http://h/v1", SECRET, "no name of an environment variable"),
        (f"http://user:{SECRET}@h/v1", "", "contains a name or a password"),
        (f"http://h/v1?api_key={SECRET}", "", "contains a query"),
        (f"http://h/v1#{SECRET}", "", "contains a query"),
    ],
)
@pytest.mark.parametrize("name", ["assistant", "judge", "source"])
def test_a_secret_in_a_setting_is_refused_and_not_repeated(name, url, key_env, words):
    """Also in a section that the run does not read: its config is stored whole."""
    (message,) = secrets.find_secrets(name, url, key_env)
    assert words in message and SECRET not in message
    cfg = base.get_config()
    cfg[name].update(url=url, key_env=key_env)
    with pytest.raises(SetupError) as caught:
        RunSettings.from_config(cfg)
    assert str(caught.value).count(words) == 1 and SECRET not in str(caught.value)


def test_ordinary_settings_are_none():
    for url in (
        "",
        "http://127.0.0.1:8000/v1",
        "https://api.example.org/v1",
        "http://[::1]:80/v1",
        "http://[bad",
    ):
        assert secrets.find_secrets("judge", url, "OPENAI_API_KEY") == []


@pytest.mark.slow
def test_a_key_is_in_nothing_that_a_run_writes(tmp_path, monkeypatch):
    """Not in its output nor in its folder, though the server repeats it; the server alone gets it."""

    def script(n, body):
        return 401, {}, f'{{"error": {{"message": "wrong key: {SECRET}"}}}}'.encode()

    server = Server(script)
    monkeypatch.setenv("MY_KEY", SECRET)
    changes = {
        "assistant.kind": "openai", "assistant.url": server.url, "assistant.model": "m",
        "assistant.key_env": "MY_KEY", "assistant.probe": False, "assistant.retries": 0, "steps": 12,
        "eval.every": 0,
    }  # fmt: skip
    done = tiny_runs.run(tmp_path / "run", **changes)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "http_401" in said, said
    assert any(SECRET in headers["Authorization"] for _, headers, _ in server.requests)
    assert SECRET not in said
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
