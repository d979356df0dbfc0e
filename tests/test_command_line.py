"""Command lines of the launch scripts: help, errors in flags and config files, setup errors all at once."""

import errno
import logging
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from absl import flags

from cooper_jax.configs import base, tiny
from cooper_jax.launch import command_line, library_errors
from cooper_jax.model.loading import load_tokenizer
from cooper_jax.settings import config_files
from cooper_jax.settings.config_fields import (
    describe_unknown_field,
    find_nearest,
    flatten_config,
    list_fields,
)
from cooper_jax.settings.renamed_flags import REMOVED, RENAMED_FLAGS, describe_rename
from cooper_jax.settings.setup_errors import SetupError, setup_errors
from cooper_jax.trainer import recipes, setup

ROOT = Path(__file__).resolve().parents[1]
OF_BASE = "from cooper_jax.configs import base\ndef get_config():\n    c = base.get_config()\n"
CONFIG_SCRIPTS = (
    "train",
    "train_rm",
    "annotate",
    "evaluate",
    "study",
    "bench",
    "compile",
    "compare_rollouts",
)


@pytest.fixture
def own() -> flags.FlagValues:
    """The flags of a script that takes a config."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "A config file.", flag_values=values)
    flags.DEFINE_bool("traceback", False, "Where.", flag_values=values)
    flags.DEFINE_integer("reps", 3, "Calls.", flag_values=values)
    flags.DEFINE_enum("judge", "rule", ["rule", "model"], "Who.", flag_values=values)
    return values


def errors(own, *arguments, renamed=RENAMED_FLAGS) -> list[str]:
    return command_line.find_flag_errors(["x", *arguments], own, tiny.get_config(), renamed)


# --- help ------------------------------------------------------------------------------------------------------


def test_every_field_is_documented_once_with_its_comment():
    config = base.get_config()
    fields = list_fields(config)
    assert sorted(f.name for f in fields) == sorted(flatten_config(config))
    found = {f.name: f for f in fields}
    # A trailing comment, one above, one of a section within a section.
    assert found["rollout.group_size"].comment == "G, the responses to each prompt"
    assert found["rollout.max_rows"].comment.startswith("Number of slots, that is of rows decoded")
    assert found["assistant.arch.tied"].comment == "the output head is the embedding, transposed"
    assert found["steps"].comment.startswith("Cooper steps in all")
    assert found["mesh.data"].comment.startswith("devices along the axis `data`")
    assert [f.name for f in fields][:3] == ["name", "seed", "steps"], "in the order of configs/base.py"
    assert [f.name for f in fields if not f.comment] == []


def test_help_shows_a_files_values_and_one_section(own, capsys):
    file = str(ROOT / "configs/tiny.py")
    command_line.print_help("Trains.\n\n    python x.py", own, file, "")
    text = capsys.readouterr().out
    assert "Trains.\n\n    python x.py\n" in text
    assert "  --config.data.synthetic_size (int, 4096): number of distinct" in text
    assert "\npolicy\n" in text and "--config.policy.optimiser.lr (float, 0.00015)" in text
    assert "--config.pairs.per_prompt (int, 3)" in text, "the file's recipe is applied"
    assert all(f"--config.{name} (" in text for name in flatten_config(base.get_config()))
    assert max(map(len, text.splitlines())) <= 100

    command_line.print_help("Trains.", own, None, "policy.optimiser")
    text = capsys.readouterr().out
    assert "Trains" not in text and "--config.policy.optimiser.lr (float, 1e-06)" in text
    assert "policy.clip_low" not in text and "reward" not in text
    with pytest.raises(SetupError, match="--help=polcy: there is no such section; it is one of annotate"):
        command_line.print_help("", own, None, "polcy")


@pytest.mark.parametrize(
    "flag, section", [("--help", ""), ("-h", ""), ("--help=data", "data"), ("--steps", None)]
)
def test_help_is_asked_for(flag, section):
    assert command_line.find_help_request(["x", "--config=c.py", flag]) == section


@pytest.mark.parametrize("script", [*CONFIG_SCRIPTS, "export", "check_estimates", "check_device", "report"])
def test_every_script_answers_help(script):
    path = ROOT / f"launch/{script}.py"
    # An import of jax would take longer than the help itself.
    blocked = f"import sys; sys.modules['jax'] = None; import runpy; sys.argv = [{str(path)!r}, '-h']; "
    done = subprocess.run(
        [sys.executable, "-c", blocked + f"runpy.run_path({str(path)!r}, run_name='__main__')"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"launch/{script}.py" in done.stdout and "\nFlags:\n" in done.stdout
    assert "  --out (string" in done.stdout or script in ("train", "train_rm", "compare_rollouts")
    assert ("--config.policy.clip_low (float, 0.2)" in done.stdout) == (script in CONFIG_SCRIPTS)


# --- flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.rollout.max_new_token=3", "--config.rollout.max_new_token: the config does not have this field; "
         "did you mean --config.rollout.max_new_tokens?"),
        ("--config.polcy.lr=1", "--config.polcy.lr: the config does not have this field; did you mean "
         "--config.policy.optimiser.lr?"),
        ("--config.policy.xyzzy=1", "--config.policy.xyzzy: the config does not have this field; --help lists the "
         "fields"),
        ("--confg=x", "--confg: there is no such flag; did you mean --config?"),
        ("--steps=3", "--steps: there is no such flag; did you mean --config.steps?"),
        ("--confg.mesh.data=2", "--confg.mesh.data: there is no such flag; did you mean --config.mesh.data?"),
        ("--config.steps=abc", "--config.steps=abc: expected int (invalid literal for int() with base 10: 'abc')"),
        ("--config.resume=maybe", "--config.resume=maybe: expected bool (Non-boolean argument to boolean flag: "
         "maybe)"),
        ("--config.steps", "--config.steps: it has no value; give --config.steps=VALUE"),
        ("--reps=many", "--reps=many: expected int (invalid literal for int() with base 10: 'many')"),
        ("--judge=me", "--judge=me: expected string enum (value should be one of <rule|model>)"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named_alone(own, flag, message):
    right = ["--config=c.py", "--config.seed=3", "--noconfig.resume", "--config.steps", "-4", "--traceback"]
    assert errors(own, *right, flag) == [message]


def test_right_flags_are_accepted(own):
    right = [
        "--config",
        "c.py",
        "--config.seed",
        "-1",
        "--config.policy.optimiser.lr=1e-3",
        "--config.resume",
    ]
    right += [
        "--config.pairs.negatives=('swap','assistant')",
        "--config.mesh.rules[0]=('a','b')",
        "--notraceback",
    ]
    assert errors(own, "positional", *right, "--judge=model", "--", "--no_flag") == []


def test_all_wrong_flags_are_reported(own):
    assert len(errors(own, "--config.stepz=3", "--config.seed=x", "--repz=3")) == 3


def test_a_renamed_flag_fails_with_its_new_name(own):
    table = {
        "reward.guardian": "reward.answer_required",
        "pairs.mined": REMOVED + "it changed no result",
        "old.": "policy.",
    }
    given = ["--config.reward.guardian=1", "--config.pairs.mined=1", "--config.old.clip_low=1"]
    assert errors(own, *given, renamed=table) == [
        "--config.reward.guardian is now --config.reward.answer_required",
        "--config.pairs.mined was removed: it changed no result",
        "--config.old.clip_low is now --config.policy.clip_low",
    ]
    assert describe_rename("reward.answer_required", table) is None


def test_the_table_of_renamed_flags_leads_to_fields_that_exist():
    names = flatten_config(base.get_config())
    for old, new in RENAMED_FLAGS.items():
        assert not any(name == old or (old.endswith(".") and name.startswith(old)) for name in names), old
        if not new.startswith(REMOVED):
            assert any(name == new or (new.endswith(".") and name.startswith(new)) for name in names), new


@pytest.mark.parametrize(
    "old, new",
    [
        ("warmup.policy_steps", "supervised.policy_steps"),
        ("warmup.start", "supervised.start_from"),
        ("reward.warm_start", "reward.warmup_updates"),
        ("rollout.weights", "rollout.weight_placement"),
        ("reward.guard", "reward.answer_required"),
        ("reward.either", "reward.rule_or_model"),
    ],
)
def test_a_renamed_flag_leads_to_its_new_name(old, new):
    assert describe_rename(old) == f"is now --config.{new}"


def test_a_misspelt_old_name_leads_to_the_new_one():
    message = describe_unknown_field("reward.gaurd", flatten_config(base.get_config()))
    assert message.endswith("did you mean --config.reward.guard? It is now --config.reward.answer_required")


def test_the_nearest_field():
    names = flatten_config(base.get_config())
    assert find_nearest("policy.clip_hihg", names) == "policy.clip_high"
    assert find_nearest("rolout.top_p", names) == "rollout.top_p"
    assert find_nearest("reward.lr", names) == "reward.optimiser.lr"
    assert find_nearest("zzz", names) is None


# --- config files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("import nothing_there\n", "line 1: ModuleNotFoundError: No module named 'nothing_there'"),
        ("def get_config():\n    c = 1\n    return foo\n", "line 3: NameError: name 'foo' is not defined"),
        ("", "AttributeError: module 'checked_config' has no attribute 'get_config'"),
        ("def get_config():\n    return 3\n", "get_config() returns int, not a ConfigDict"),
        (
            OF_BASE + "    c.stepz = 3\n    return c\n",
            "as in --config.stepz: the config does not have this field; did you mean --config.steps?",
        ),
        (
            OF_BASE + "    c.steps = 'x'\n    return c\n",
            "line 4: TypeError: Could not override field 'steps'",
        ),
    ],
)
def test_an_error_in_a_config_file_is_one_line(text, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(SetupError) as error:
        config_files.load_config(str(file))
    (line,) = error.value.messages
    assert line.startswith(f"--config={file}: {message}") and "\n" not in line, line


def test_a_missing_config_file_names_the_shipped_ones():
    with pytest.raises(
        SetupError, match="'nowhere.py'; the shipped configs are base, .*tiny.*as in --config="
    ):
        config_files.load_config("nowhere.py")


# --- setup errors ----------------------------------------------------------------------------------------------


def test_all_setup_errors_are_reported_at_once(monkeypatch):
    """Settings, choices, the optimiser, the assistant's server and the mesh: nothing is loaded for any of them."""
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    cfg = tiny.get_config()
    recipes.apply_presets(cfg, ())
    cfg.steps, cfg.rollout.top_p, cfg.policy.epochs = -1, 0.9, 2
    cfg.policy.kl_estimator, cfg.policy.optimiser.lr = "k9", -1.0
    cfg.reward.pair_loss = "hinge"
    cfg.assistant.kind, cfg.assistant.url, cfg.assistant.key_env = "openai", "https://h/v1", "NO_SUCH_KEY"
    cfg.mesh.data, cfg.rollout.max_rows = 8, 3
    with pytest.raises(SetupError) as error:
        setup.read_settings(cfg)
    said = error.value.messages
    wanted = [
        "rollout.top_p=0.9", "steps=-1: it must be at least 0", "policy.kl_estimator='k9'",
        "reward.pair_loss='hinge'", "policy.optimiser.lr=-1.0", "--config.assistant.model",
        "environment variable NO_SUCH_KEY contains no key", "rollout.max_rows=3",
    ]  # fmt: skip
    assert len(said) == len(wanted) and not any("\n" in line for line in said), said
    for words in wanted:
        assert sum(words in line for line in said) == 1, (words, said)

    cfg.assistant.key_env, cfg.assistant.model = "", "m"  # a server without keys
    with pytest.raises(SetupError) as error:
        setup.read_settings(cfg)
    assert len(error.value.messages) == len(wanted) - 2


def test_errors_end_a_command_with_a_line_each():
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), f"--config={ROOT / 'configs/tiny.py'}"]
        + ["--config.stepz=3", "--config.seed=x"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [
        " --config.stepz",
        " --config.seed=x",
    ]


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_the_first_line_comes_before_jax_is_imported(tmp_path, terminal):
    """An import of JAX takes seconds, in which a user would see nothing.  Here it fails."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("raise ImportError('not here')\n")
    reader, writer = pty.openpty() if terminal else os.pipe()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), f"--config={ROOT / 'configs/tiny.py'}"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "TERM": "xterm"},
        stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    # What is written is short enough to wait in a pipe or a terminal until it is read.
    os.close(writer)
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert done.returncode == 1 and "ImportError: not here" in done.stderr, done.stderr
    assert "loading the libraries " in shown and ("\x1b" in shown) == terminal, shown


def test_help_may_be_cut_by_its_reader():
    """As in `train.py --help | head`: the reader closes the pipe before all is written."""
    command = [sys.executable, str(ROOT / "launch/train.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_a_missing_key_is_reported_without_quotes():
    with (
        pytest.raises(SetupError, match=r"^--run_dir=runs/x: no item 'reward'$"),
        setup_errors("--run_dir=runs/x"),
    ):
        raise KeyError("no item 'reward'")


def test_missing_weights_are_reported_as_weights(tmp_path):
    section = base.get_config().policy
    for field in ("weights", "tokenizer"):
        section[field] = str(tmp_path / "none")
        with pytest.raises(SetupError, match=f"^policy.{field}='"):
            load_tokenizer(section, "policy", tmp_path)


def test_a_full_disk_costs_a_thread_of_a_library_one_line(monkeypatch, capsys):
    def fail(error):
        raise error

    class FailingAtEnd:
        def __del__(self):
            fail(self.error)

    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_value))
    monkeypatch.setattr(sys, "unraisablehook", lambda args: reported.append(args.exc_value))
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: reported.append(error))
    library_errors.shorten_disk_errors()

    full, other = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError("another")
    for error in (full, other):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
        at_end = FailingAtEnd()
        at_end.error = error
        del at_end
    assert reported == [other, other]
    line = "warning: tests/test_command_line.py: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == line * 2

    # Late callbacks of Orbax, in threads alone.
    reported.clear()
    late = RuntimeError("Event loop is closed")
    for error in (late, other):
        thread = threading.Thread(target=sys.excepthook, args=(type(error), error, None))
        thread.start()
        thread.join()
    sys.excepthook(RuntimeError, late, None)
    assert reported == [other, late]


@pytest.mark.parametrize(
    ("logger", "level", "path", "error", "expected"),
    [
        ("asyncio", logging.ERROR, "base_events.py", OSError(errno.ENOSPC, "full"), False),
        ("asyncio", logging.ERROR, "base_events.py", ValueError("RESOURCE_EXHAUSTED: Error writing"), False),
        ("asyncio", logging.ERROR, "base_events.py", OSError(errno.EIO, "input/output error"), True),
        ("absl", logging.ERROR, "lib/orbax/checkpoint/x.py", None, False),
        ("absl", logging.WARNING, "lib/orbax/checkpoint/x.py", None, True),
        ("absl", logging.ERROR, "lib/other/x.py", None, True),
    ],
)
def test_logged_errors_that_the_run_reports_itself(logger, level, path, error, expected):
    info = None if error is None else (type(error), error, None)
    record = logging.LogRecord(logger, level, path, 1, "message", (), info)
    assert library_errors.is_news(record) is expected
