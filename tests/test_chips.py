"""The table of chips, names of machines, and what their networks take, by hand."""

import re
from types import SimpleNamespace

import pytest

from cooper_jax.perf import chips
from cooper_jax.perf.chips import CHIPS, Topology
from cooper_jax.settings.setup_errors import SetupError


def tpu(x, y, z=0, slice_index=None):
    return SimpleNamespace(coords=[x, y, z], slice_index=slice_index, process_index=0)


def grid(name, chip, *sizes, slices=(None,)):
    x, y, z = (*sizes, 1)[:3]
    devices = (tpu(i, j, k, s) for s in slices for k in range(z) for j in range(y) for i in range(x))
    return Topology(name, CHIPS[chip], tuple(devices))


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("v9:4x4", "'v9:4x4' is unknown: write CHIP:SIZES"),
        ("v5e", "is unknown"),
        ("", "is unknown"),
        ("v5e:4x4x4", "v5e takes 2 sizes"),
        ("v5p:4x4", "v5p takes 3 sizes"),
        ("h100:8", "h100 takes 3 sizes"),
        ("h100:1x1x8*2", "no \\*slices"),
        ("l4:1", "l4 takes 3 sizes"),
        ("v5e:4x0", "at least 1"),
        ("cpu:99", "8 CPU devices; set XLA_FLAGS=--xla_force_host_platform_device_count=99"),
    ],
)
def test_names_that_are_none(name, complaint):
    with pytest.raises(SetupError, match=complaint):
        chips.find_topology(name)


@pytest.mark.parametrize(
    "name, requirements", [("v5e:2x4", "tpu"), ("h100:1x1x2", "cuda"), ("l4:1x1x1", "cuda")]
)
def test_a_missing_compiler_is_named(monkeypatch, name, requirements):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(
        SetupError, match=f"compiler is absent: pip install -r requirements-{requirements}.txt"
    ):
        chips.find_topology(name)


def test_targets_of_gpus_agree_with_the_table():
    """Memory and bandwidth stand in both; lanes x 2 x clock are the float32 rate of NVIDIA's data sheets."""
    float32 = {"h100": 67e12, "l4": 30.3e12}
    for name, target in chips.GPU_TARGETS.items():
        fields = {key: float(value) for key, value in re.findall(r"(\w+): ([\d.]+)", target)}
        assert fields["device_memory_size"] == CHIPS[name].memory
        assert fields["memory_bandwidth"] == pytest.approx(CHIPS[name].bandwidth, rel=1e-3)
        lanes = fields["core_count"] * fields["fpus_per_core"]
        assert lanes * 2 * fields["clock_rate_ghz"] * 1e9 == pytest.approx(float32[name], rel=0.01)


def test_cpu_devices_are_this_machines():
    found = chips.find_topology("cpu:4")
    assert len(found.devices) == 4 and found.chip.nominal


def test_links_in_use():
    """An axis counts once, and twice where the group covers it and it closes to a ring."""
    link = CHIPS["v5e"].link
    small, pod, cube = grid("", "v5e", 4, 4), grid("", "v5e", 16, 16), grid("", "v5p", 4, 4, 4)
    assert small.rate(small.devices[:4]) == link  # a row of 4: no ring
    assert small.rate(small.devices) == 2 * link
    assert pod.rate(pod.devices[:16]) == 2 * link  # a row of 16: a ring
    assert pod.rate(pod.devices[:4]) == link
    assert pod.rate(pod.devices) == 4 * link
    assert cube.rate(cube.devices) == 6 * CHIPS["v5p"].link


def test_seconds_within_a_slice():
    pod = grid("", "v5e", 16, 16)
    assert pod.seconds("all-gather", 9e9, pod.devices) == pytest.approx(9e9 / (4 * CHIPS["v5e"].link))


def test_seconds_over_slices():
    """Of an array of 32 MB, gathered over 2 slices of 16: 15/16 by links, and half of a 16th over the network."""
    two = grid("", "v5e", 4, 4, slices=(0, 1))
    chip, whole = CHIPS["v5e"], 32e6
    sent = whole * 31 / 32
    expected = whole * 15 / 16 / (2 * chip.link) + whole / 2 / 16 / chip.outside
    assert two.seconds("all-gather", sent, two.devices) == pytest.approx(expected)
    assert two.seconds("collective-permute", 1e6, two.devices) == pytest.approx(1e6 / chip.outside)


def test_hosts_of_gpus_are_joined_by_the_network():
    gpus = tuple(SimpleNamespace(process_index=i // 8) for i in range(16))
    machine, chip, whole = Topology("", CHIPS["h100"], gpus), CHIPS["h100"], 16e6
    inside = machine.seconds("all-gather", whole * 7 / 8, gpus[:8])
    assert inside == pytest.approx(whole * 7 / 8 / chip.link)
    both = machine.seconds("all-gather", whole * 15 / 16, gpus)
    assert both == pytest.approx(whole * 7 / 8 / chip.link + whole / 2 / 8 / chip.outside)
