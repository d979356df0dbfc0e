"""The installed package: what a wheel holds, what it needs, and its command `cooper-jax`."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cooper_jax
from cooper_jax.launch import cli, command_line
from cooper_jax.runtime.extras import import_extra
from cooper_jax.settings import config_files
from cooper_jax.settings.setup_errors import SetupError, setup_errors

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def read_requirements(name: str) -> list[str]:
    """The requirements of a file, sorted, without those of a file that it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return sorted(line for line in lines if line and not line.startswith("-r"))


def test_requirements_and_pyproject_agree():
    """requirements.txt is complete; the package leaves out what few users need, as extras."""
    optional = [r for extra in ("gcs", "tfds", "figures", "serve") for r in EXTRAS[extra]]
    assert sorted([*PROJECT["dependencies"], *optional]) == read_requirements("requirements.txt")
    for extra in ("tpu", "cuda", "test"):
        assert sorted(EXTRAS[extra]) == read_requirements(f"requirements-{extra}.txt"), extra
    trackers = ("tensorboard", "wandb", "trackio", "mlflow")
    assert EXTRAS["trackers"] == [f"cooper-jax[{','.join(trackers)}]"]
    for extra in trackers:
        assert set(EXTRAS[extra]) < set(EXTRAS["test"]), extra


def test_the_page_about_installing_names_every_extra():
    page = (ROOT / "docs/install.md").read_text()
    rows = re.search(r"^\| extra \|.*\n\|.*\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
    named = [name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(EXTRAS)


def test_the_citation_has_the_version_and_the_license():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {cooper_jax.__version__}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    assert f"\n## {cooper_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the checkout: a build writes beside the sources."""
    place = tmp_path_factory.mktemp("wheel")
    kept = ("cooper_jax", "kernels", "configs", "launch")
    for folder in kept:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, place / "source" / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source")

    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "-w", str(place), str(place / "source")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = place.glob("*.whl")
    return path


def test_a_wheel_holds_one_top_level_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    information = f"cooper_jax-{cooper_jax.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"cooper_jax", information}
    assert f"{information}/licenses/LICENSE" in names


def test_a_wheel_holds_all_modules(wheel):
    """Those of the linked folders as well, each once."""
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    expected = []
    for folder in ("cooper_jax", "kernels", "configs", "launch"):
        for file in (ROOT / folder).rglob("*.py"):  # which does not follow symlinks
            name = file.relative_to(ROOT).as_posix()
            expected.append(name if folder == "cooper_jax" else f"cooper_jax/{name}")
    assert sorted(names) == sorted(expected)


def test_a_wheel_holds_the_parts_of_a_report(wheel):
    names = {
        name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cooper_jax/report/static/")
    }
    files = (ROOT / "cooper_jax/report/static").iterdir()
    assert names == {file.relative_to(ROOT).as_posix() for file in files} and len(names) >= 10


def test_the_installed_files_run_by_themselves(wheel, tmp_path):
    """`cooper-jax` of an unpacked wheel, which knows no checkout, reads a shipped config by its bare name."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from cooper_jax.launch import cli\n"
        "sys.argv[0] = 'cooper-jax'\n"
        "cli.main()"
    )
    words = ["train", "--config=tiny", "--config.steps=2", "--config.reward.arm=ruel"]
    command = [sys.executable, "-c", program, str(tmp_path / "site"), *words]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert "reward.arm" in ran.stderr and "ruel" in ran.stderr and "Traceback" not in ran.stderr


def test_the_help_lists_every_subcommand(monkeypatch, capsys):
    for words in ([], ["--help"], ["-h"]):
        monkeypatch.setattr(sys, "argv", ["cooper-jax", *words])
        cli.main()
        text = capsys.readouterr().out
        for name in cli.COMMANDS:
            assert re.search(rf"^  {name} +\w", text, flags=re.M), name
    assert "qwen_1p5b" in text


def test_every_script_is_a_subcommand():
    scripts = {file.stem for file in (ROOT / "launch").glob("*.py")}
    assert scripts - set(cli.COMMANDS) == {
        "__init__",
        "cli",
        "command_line",
        "common",
        "library_errors",
        "local_hosts",
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian"], "error: trian: not a subcommand; there are train, train_rm"),
        (
            ["train", "--config=tinny"],
            "error: --config=tinny: No such file or directory: 'tinny'; the shipped configs are base",
        ),
    ],
)
def test_unknown_names_are_one_line(words, message):
    command = [sys.executable, "-c", "from cooper_jax.launch import cli; cli.main()", *words]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2 and ran.stderr.startswith(message) and ran.stderr.count("\n") == 1, ran.stderr


def test_bare_names_are_shipped_configs():
    tiny = str(config_files.CONFIGS / "tiny.py")
    assert command_line.resolve_configs(["--config=tiny", "--config.steps=2"]) == [
        f"--config={tiny}",
        "--config.steps=2",
    ]
    assert command_line.resolve_configs(["--config", "tiny", "--out", "tiny"]) == [
        "--config",
        tiny,
        "--out",
        "tiny",
    ]
    assert command_line.resolve_configs(["--config=tiny:2"]) == [f"--config={tiny}:2"]
    assert command_line.resolve_configs(["--config=./tiny", "--config=tiny.py"]) == [
        "--config=./tiny",
        "--config=tiny.py",
    ]


def test_scripts_take_bare_names():
    command = [sys.executable, "launch/train.py", "--config=tiny", "--config.reward.arm=ruel"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2 and "reward.arm" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


def test_a_missing_package_is_named():
    with pytest.raises(
        ImportError, match=r"^no_such_package is not installed: pip install 'cooper-jax\[gcs\]'"
    ):
        import_extra("no_such_package", "gcs")
    with pytest.raises(
        SetupError, match="^data.train: a package is missing or broken: no_such_package is not"
    ):
        with setup_errors("data.train"):
            import_extra("no_such_package", "gcs")


def test_a_package_that_fails_within_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        import_extra("broken_extra", "gcs")
