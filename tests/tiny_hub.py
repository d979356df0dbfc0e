"""The Hugging Face hub's cache on this machine, as a download leaves it."""

from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_hub_cache(cache: Path, repo: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """Write a data set into a cache, with `commit` as its main branch; returns the folder of its files."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


def make_card(*configs: tuple[str, tuple[str, ...]]) -> bytes:
    """A README.md that lists the files of (config, splits) as `CONFIG/SPLIT-*`."""
    lines = ["---", "license: mit", "configs:"]
    for config, splits in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    return "\n".join([*lines, "---", "# Data", ""]).encode()
