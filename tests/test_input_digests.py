"""A resumed run notices other contents of its files, and says which."""

import json
from pathlib import Path

import pytest
import tiny_directories
from tiny_steps import config

from cooper_jax.runtime import file_digests
from cooper_jax.runtime.file_digests import digest_file
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import input_digests
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.setup import load_inputs


@pytest.fixture
def start(tmp_path):
    """() -> a start of a run, up to where weights would be read."""
    from cooper_jax.runtime.device_layouts import lay_out_models

    tiny_directories.write_model(tmp_path / "policy", "logits")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(**{
        "data.format": "auto", "data.train": str(tmp_path / "train.jsonl"), "data.eval_from_train": 4,
        "policy.weights": str(tmp_path / "policy" / "hf"), "reward.arm": "rule", "reward.answer_required": False,
    })  # fmt: skip
    settings = RunSettings.from_config(cfg)

    def begin() -> Path:
        load_inputs(settings, lay_out_models(settings.mesh), tmp_path / "run")
        return tmp_path / "run"

    return begin


def change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_resumed_run_refuses_other_contents(start, tmp_path):
    run = start()
    record = json.loads((run / "provenance.json").read_text())
    assert record["environment"]["packages"]["jax"] and record["environment"]["devices"]
    assert sum(len(files) for files in record["inputs"].values()) >= 5
    (run / "checkpoints" / "0").mkdir(parents=True)
    start()  # nothing has changed

    changes = {
        "train.jsonl": lambda path: path.write_text(path.read_text().replace("What is 7", "What is 8")),
        "policy/hf/model.safetensors": change_last_byte,
        "policy/hf/tokenizer.json": lambda path: path.write_text(path.read_text() + " "),
    }
    for name, change in changes.items():
        before = (tmp_path / name).read_bytes()
        was = digest_file(tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(SetupError) as error:
            start()
        (line,) = error.value.messages
        assert Path(name).name in line and was[:12] in line and digest_file(tmp_path / name)[:12] in line
        assert "delete" in line and "provenance.json" in line and "\n" not in line
        (tmp_path / name).write_bytes(before)
    start()

    # The way out that the message names.
    changes["train.jsonl"](tmp_path / "train.jsonl")
    (run / "provenance.json").unlink()
    start()
    start()


def test_a_run_of_an_earlier_version_gets_its_record_when_it_resumes(start):
    run = start()
    (run / "provenance.json").unlink()
    (run / "checkpoints" / "0").mkdir(parents=True)
    start()
    assert json.loads((run / "provenance.json").read_text())["inputs"]


def test_a_run_without_checkpoints_begins_again(start, tmp_path):
    start()
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps({"question": "What is 1?", "answer": "#### 1"}) + "\n")
    run = start()
    digests = json.loads((run / "provenance.json").read_text())["inputs"]
    assert digest_file(tmp_path / "train.jsonl") in str(digests)


def test_a_damaged_record_is_named(start):
    run = start()
    (run / "checkpoints" / "0").mkdir(parents=True)
    (run / "provenance.json").write_text("{}")
    with pytest.raises(SetupError, match="provenance.json is damaged .*delete it"):
        start()


def test_a_large_file_is_sampled(tmp_path, monkeypatch):
    """Its size, its header, its end, and evenly spaced blocks."""
    monkeypatch.setattr(file_digests, "_BLOCK", 10)
    monkeypatch.setattr(file_digests, "_BLOCKS", 4)
    path = tmp_path / "w"
    content = bytes(range(200))
    path.write_bytes(content)
    digest = digest_file(path)
    assert digest.startswith("sampled:")
    for at in (0, 9, 190, 199, 65):  # in the first, the last and another block
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        assert digest_file(path) != digest, at
    path.write_bytes(content + b"x")
    assert digest_file(path) != digest
    path.write_bytes(content[:40])
    assert len(digest_file(path)) == 64


def test_changes_of_files_are_described():
    before = {"data.train=d": {"a": "1" * 64, "b": "2" * 64}, "gone": {"x": "1"}}
    now = {"data.train=d": {"a": "1" * 64, "c": "sampled:" + "3" * 64}, "new": {"y": "1"}}
    gone, new = input_digests._find_changes(before, now, "run/provenance.json")
    assert (
        "data.train=d: b is not what the run began with (SHA-256 222222222222 then, no such file now)" in gone
    )
    assert "c is not what the run began with (no such file then, sampled 333333333333 now)" in new
