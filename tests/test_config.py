"""Configs: every knob is read, every file changes declared fields alone, a misspelt flag is an error."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from knobs import sections_and_leaves, unread
from ml_collections import ConfigDict

from cooper_jax.configs import base

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Dotted module name -> text, of all that may read a config."""
    texts = {}
    for package in (ROOT / "cooper_jax", ROOT / "cooper_jax" / "launch"):
        for file in package.rglob("*.py"):
            texts[".".join(file.relative_to(ROOT).with_suffix("").parts)] = file.read_text()
    return texts


@pytest.fixture(scope="module")
def never(sources) -> list[str]:
    return unread(base.get_config(), sources)


def test_every_knob_is_read(never):
    assert never == [], (
        f"no code reads {', '.join(never)}: use them as `section.name`, from a variable that the section reaches "
        "by assignment, argument, return or field (not in a message or a `check` alone), or take them out"
    )


def test_a_knob_that_nobody_reads_is_found(sources, never):
    """In whatever section, even where the sections beside it have a knob of that name that is read."""
    config = base.get_config()
    with config.unlocked():
        config.policy.optimiser.amsgrad = False
        config.mesh.pipeline = 1
        config.pairs.lr = 0.1
        config.colour = "red"
    assert sorted(set(unread(config, sources)) - set(never)) == [
        "colour", "mesh.pipeline", "pairs.lr", "policy.optimiser.amsgrad",
    ]  # fmt: skip


MAIN = """
from pkg import wing
from pkg.parts import Parts, make as build
CONFIG = config_flags.DEFINE_config_file("config")

def main():
    cfg = CONFIG.value
    parts = Parts(cfg, opt=build(cfg.a.opt))
    wing.run(parts)
    print(f"{cfg.c.printed}")
"""
PARTS = """
@dataclass
class Parts:
    cfg: ConfigDict
    opt: Opt

def make(section):
    def inner():
        return section.lr
    return inner
"""
WING = """
from functools import partial
from pkg import parts

def check(cfg):
    need(cfg.c.checked > 0)

def run(p):
    check(p.cfg)
    section, other = p.cfg.b, 1
    for key in ("by_key", "missing"):
        section[key]
    for name, part in (("a", p.cfg.a), ("b", p.cfg.b)):
        part.shared
    partial(late, pick(p.cfg))
    p.cfg.c.written = 1
    model.opt.eps, lr

def pick(config):
    return config.d if config.flag else None

def late(chosen, *, unused=None):
    chosen["x"], chosen.y
"""


def test_the_analysis_follows_a_section():
    """Read in `WING` and `PARTS`: by assignment, argument, return, field, closure, literal loop and key."""
    config = ConfigDict(
        {
            "a": {"opt": {"lr": 1, "eps": 1}, "shared": 1},
            "b": {"opt": {"lr": 1, "eps": 1}, "shared": 1, "by_key": 1, "never": 1},
            "c": {"printed": 1, "checked": 1, "written": 1},
            "d": {"x": 1, "y": 1, "z": 1},
            "flag": True,
            "name": "",
        }
    )
    sources = {"launch.main": MAIN, "pkg.parts": PARTS, "pkg.wing": WING}
    assert unread(config, sources) == [
        "a.opt.eps",  # `model.opt.eps`: that `opt` holds no section
        "b.never", "b.opt.eps", "b.opt.lr",  # its sister's lr is read, not its own
        "c.checked", "c.printed", "c.written",
        "d.z", "name",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_change_declared_fields_alone(name):
    """base.py declares; the others may not add a field, nor change a field's type (the lock does not see that)."""
    ours, declared = importlib.import_module(f"cooper_jax.configs.{name}").get_config(), base.get_config()
    assert sections_and_leaves(ours) == sections_and_leaves(declared)
    for path in sections_and_leaves(declared)[1]:
        value, default = ours, declared
        for part in path:
            value, default = value[part], default[part]
        assert default is not None and type(value) is type(default), path
    assert name == ours.name, "a run directory is named after its config"
    assert importlib.import_module(f"cooper_jax.configs.{name}").__doc__


def test_sections_are_not_shared():
    """A section that stands in two places must not be one object: a change would reach both."""
    seen = {}

    def walk(section, path):
        for name, value in section.items():
            if isinstance(value, ConfigDict):
                assert id(value) not in seen, (seen[id(value)], f"{path}{name}")
                seen[id(value)] = f"{path}{name}"
                walk(value, f"{path}{name}.")

    config = base.get_config()
    walk(config, "")
    assert len(seen) > 15


def test_an_unknown_field_is_refused():
    config = base.get_config().lock()
    with pytest.raises(AttributeError, match="kl_coeff"):
        config.policy.kl_coeff = 0.1
    with pytest.raises(AttributeError, match="kl_coeff"):
        _ = config.policy.kl_coeff


FLAGS = """
import sys
from absl import app
from ml_collections import config_flags
CONFIG = config_flags.DEFINE_config_file("config", None, "", lock_config=True)
app.run(lambda argv: print(CONFIG.value.policy.kl_coef, CONFIG.value.mesh.data))
"""


@pytest.mark.parametrize(
    "flag, code, words",
    [
        ("--config.policy.kl_coef=0.25", 0, "0.25 1"),
        ("--config.policy.kl_coeff=0.25", 1, "Did you mean"),
        ("--config.polcy.kl_coef=0.25", 1, "polcy"),
        ("--config.mesh.data=two", 1, "two"),
        ("--confg.mesh.data=2", 1, "Unknown command line flag"),
    ],
)
def test_flags(flag, code, words):
    """A misspelt flag ends the program before anything is begun."""
    command = [sys.executable, "-c", FLAGS, f"--config={ROOT}/configs/base.py", flag]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == code and words in done.stdout + done.stderr, done.stdout + done.stderr
