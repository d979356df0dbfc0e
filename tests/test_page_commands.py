"""The fenced commands of the pages: each has a rule that says how it is run, or why not; short ones are run."""

from __future__ import annotations

import re
import shlex

import page_commands
import pytest
import run_page_commands
from absl import flags
from ml_collections import config_flags
from page_command_rules import RULES
from page_commands import Command, Rule

from cooper_jax.reward_training.rm_setup import RmSettings
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import recipes
from cooper_jax.trainer.run_settings import RunSettings


@pytest.fixture(scope="module")
def commands():
    return [command for command in page_commands.list_commands() if not command.is_setting]


def test_every_command_has_a_rule_and_every_rule_a_command(commands):
    used = {page_commands.find_rule(command, RULES).pattern for command in commands}
    assert len(commands) > 200
    assert [rule.pattern for rule in RULES if rule.pattern not in used] == []


def test_what_is_run_has_no_placeholder_and_what_is_not_has_a_reason(commands):
    for command in commands:
        rule = page_commands.find_rule(command, RULES)
        if not rule.skip:
            assert page_commands.prepare(command, rule)
            page_commands.make_program(command, rule)
    assert all(len(rule.skip) > 10 for rule in RULES if rule.skip)
    assert all(not (rule.skip and (rule.append or rule.replace or rule.needs)) for rule in RULES)


def test_programs_of_the_pages_are_python(commands):
    """Also those that are not run."""
    programs = [command for command in commands if command.language == "python"]
    for program in programs:
        # A signature has no body.
        text = program.text + ("\n    ..." if program.text.count("\n") == 1 else "")
        compile(text.replace("| None\n", "| None:\n"), program.place, "exec")
    assert len(programs) >= 10


# --- splitting and preparing -----------------------------------------------------------------------------


def test_a_block_is_split_into_whole_commands():
    block = (
        "# a comment\n"
        "A=1; B='x'   # a setting\n"
        "python launch/a.py --x=1 \\\n"
        "    --y=2    # why\n"
        "\n"
        "for i in 1 2; do\n"
        "    python launch/b.py \\\n"
        "        --i=$i\n"
        "done\n"
        "python - <<'EOF'\n"
        "print(1)\n"
        "EOF\n"
        "curl x -d '{\n"
        "}'\n"
    )
    assert page_commands.split_commands(block) == [
        (1, "A=1; B='x'"),
        (2, "python launch/a.py --x=1 --y=2"),
        (5, "for i in 1 2; do\n    python launch/b.py --i=$i\ndone"),
        (9, "python - <<'EOF'\nprint(1)\nEOF"),
        (12, "curl x -d '{\n}'"),
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('B="python launch/bench.py"; Q="--config=x"', True),
        ("export HF_TOKEN=...", True),
        ("arms=()", True),
        ('for a in x y; do\n    arms+=(--arm="$a: b=$a")\ndone', True),
        ("XLA_FLAGS=--x python launch/study.py", False),
        ("for a in x y; do\n    python launch/train.py\ndone", False),
    ],
)
def test_settings_are_told_from_commands(text, expected):
    assert Command("page.md", 1, "bash", text).is_setting is expected


def test_the_lines_of_a_page_are_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```bash\n# first\npython launch/a.py\n```\n\ntext\n\n```python\nprint(1)\n```\n"
    )
    found = page_commands.list_commands((page,))
    assert [(c.line, c.language) for c in found] == [(5, "bash"), (11, "python")]
    with pytest.raises(ValueError, match=r"page.md:5: no rule .* for 'python launch/a.py'"):
        page_commands.find_rule(found[0], (Rule(r"b\.py"),))


def test_small_settings_are_added_to_each_line_with_a_script():
    text = "for x in 1 2; do\n    python launch/a.py --x=$x\ndone"
    prepared = page_commands.prepare(Command("p.md", 1, "bash", text), Rule("a", append="--steps=1"))
    assert prepared == "for x in 1 2; do\n    python launch/a.py --x=$x --steps=1\ndone"


@pytest.mark.parametrize(
    "text, placeholders",
    [
        ("python a.py --weights=VERIFYRM_DIR", ["VERIFYRM_DIR"]),
        ("python a.py --run_dir=gs://BUCKET/run", ["gs://BUCKET"]),
        ("python a.py --url=http://HOST:8000/v1", ["HOST"]),
        ("python a.py FILE", ["FILE"]),
        ("HF_TOKEN=... python a.py", ["..."]),
        ("python a.py --x=$MODEL --model=Qwen/Qwen2.5 --y='A friend'", []),
    ],
)
def test_placeholders_are_found(text, placeholders):
    assert page_commands.find_placeholders(text) == placeholders
    command = Command("p.md", 7, "bash", text)
    if placeholders:
        with pytest.raises(ValueError, match=r"p.md:7: .* stand for something"):
            page_commands.prepare(command, Rule("a"))


def test_a_replacement_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="p.md:1: the rule replaces 'DIR', which is not in"):
        page_commands.prepare(Command("p.md", 1, "bash", "python a.py"), Rule("a", replace=(("DIR", "x"),)))


# --- running ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, rule, code",
    [
        ("exit 0", Rule("x"), 0),
        ("false\ntrue", Rule("x"), 1),
        ("sleep 60", Rule("x", seconds=1), 124),
        # A server that is ready, and ends well at SIGTERM; and one that ends before it is ready.
        ("trap 'exit 0' TERM\necho ready\nwhile :; do sleep 0.1; done", Rule("x", until="ready"), 0),
        ("echo no", Rule("x", until="ready"), 1),
    ],
)
def test_exit_codes(tmp_path, text, rule, code):
    environment = run_page_commands.make_environment(tmp_path / "shared")
    log = tmp_path / "log"
    found = run_page_commands.run_shell(f"set -e\n{text}", tmp_path, environment, rule, log)
    assert found == code


@pytest.mark.slow
def test_short_commands_run(tmp_path, monkeypatch):
    """Those of the pages that take seconds; `python tests/run_page_commands.py` runs the others, too."""
    pages: dict[str, list[Command]] = {}
    for command in page_commands.list_commands():
        if command.is_setting or is_short(command):
            pages.setdefault(command.page, []).append(command)
    runner = run_page_commands.PageRunner(tmp_path)
    chosen = [commands for commands in pages.values() if not all(c.is_setting for c in commands)]
    outcomes = [outcome for commands in chosen for outcome in runner.run_page(commands)]
    assert len(outcomes) >= 13
    failed = [f"{o.command.place}: {o.reason}" for o in outcomes if o.state != run_page_commands.PASSED]
    assert failed == [], "\n".join(failed)


def list_run_pages() -> list[str]:
    """The pages with commands that are run."""
    return list(dict.fromkeys(command.page for command in page_commands.list_commands() if is_run(command)))


def is_run(command: Command) -> bool:
    if command.is_setting:
        return False
    try:
        return not page_commands.find_rule(command, RULES).skip
    except ValueError:
        return False  # a command without a rule must not keep this file's tests from being collected


@pytest.fixture(scope="module")
def page_runner(tmp_path_factory):
    """One for all pages: they share the models and runs of their commands, and what is compiled."""
    return run_page_commands.PageRunner(tmp_path_factory.mktemp("pages"))


@pytest.mark.slow
@pytest.mark.parametrize("page", list_run_pages())
def test_all_commands_of_a_page_run(page, page_runner):
    """Also those that take minutes; all pages take hours."""
    commands = [command for command in page_commands.list_commands() if command.page == page]
    outcomes = list(page_runner.run_page(commands))
    failed = [f"{o.command.place}: {o.reason}" for o in outcomes if o.state == run_page_commands.FAILED]
    assert failed == [], "\n".join(failed)
    assert any(outcome.state == run_page_commands.PASSED for outcome in outcomes)


def is_short(command: Command) -> bool:
    rule = page_commands.find_rule(command, RULES)
    return rule.short and not rule.skip


def test_the_list_names_every_command(capsys, commands):
    run_page_commands.list_rules(commands)
    text = capsys.readouterr().out
    assert all(re.search(rf"{re.escape(command.place)}\b", text) for command in commands)


# --- settings of what is not run ---------------------------------------------------------------------------


def read_settings_of(words: list[str], script: str) -> None:
    """Read the settings of a command as its script does, before data and weights are read."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[script, *words])
    values([script, *words])
    cfg = values.config
    recipes.apply_presets(cfg, config_flags.get_override_values(values["config"]))
    if script == "launch/train.py":
        RunSettings.from_config(cfg)
    elif script == "launch/train_rm.py":
        RmSettings.from_config(cfg)


def list_trainings(commands: list[Command]) -> list[tuple[Command, str, list[str]]]:
    """The trainings that are not run, or by launchers in a dry run: (command, script, its words for the config)."""
    found = []
    for command in commands:
        rule = page_commands.find_rule(command, RULES)
        is_run = not rule.skip and "--dry-run" not in str(rule.replace)
        if command.language != "bash" or is_run:
            continue
        words = shlex.split(command.text, comments=True) if "$" not in command.text else []
        if "..." in words:  # stands for further flags
            continue
        for script in ("launch/train.py", "launch/train_rm.py"):
            if script in words:
                after = [word for word in words[words.index(script) + 1 :] if word.startswith("--config")]
                found.append((command, script, after))
    return found


def test_settings_of_trainings_that_are_not_run_are_accepted(commands, monkeypatch):
    """Unknown fields, values of another type and settings that contradict each other are errors."""
    monkeypatch.chdir(page_commands.ROOT)
    trainings = list_trainings(commands)
    assert len(trainings) >= 15
    errors = []
    for command, script, words in trainings:
        try:
            read_settings_of(words, script)
        except (SetupError, ValueError, AttributeError) as error:
            errors.append(f"{command.place}: {error}")
    assert errors == []
    with pytest.raises(SetupError):
        read_settings_of(["--config=configs/tiny.py", "--config.reward.arm=ruel"], "launch/train.py")
