"""What a job stores of its environment."""

import json
import platform
import subprocess

import jax

import cooper_jax
from cooper_jax.runtime import environment


def test_an_environment_names_versions_and_devices(tmp_path):
    environment.write_environment(tmp_path)
    stored = json.loads((tmp_path / "environment.json").read_text())
    assert stored["cooper_jax"] == cooper_jax.__version__ and stored["python"] == platform.python_version()
    assert stored["packages"]["jax"] == jax.__version__
    assert stored["devices"] == {"cpu": jax.device_count()} and stored["backend"] == "cpu"
    # Reports are shown to others.
    assert platform.node() not in json.dumps(stored | {"system": ""})


def test_a_commit_is_marked_if_files_have_changed(tmp_path, monkeypatch):
    def run_git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    assert environment.find_commit() is None, "an installed package has no commit"
    run_git("init")
    assert environment.find_commit() is None, "there is none yet"
    (tmp_path / "file").write_text("1")
    run_git("add", "file")
    run_git("commit", "-m", "one")
    commit = environment.find_commit()
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert environment.find_commit() == commit + "+"
