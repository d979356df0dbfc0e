#!/usr/bin/env bash
# `pip install .` and then `pip install -e .` in a fresh environment, and after each the script of docs/python_api.md,
# shortened, from a folder that knows no checkout.
#
#   .ci/installed.sh FOLDER        (a new folder for the environment)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD environment=$PWD/$1

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# The programs are compiled once for both runs, and quickly: they compute little.
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$out/xla XLA_FLAGS=--xla_backend_optimization_level=0

rm -rf "$environment"
python3 -m venv "$environment"
pip() {
    "$environment/bin/pip" --quiet --disable-pip-version-check "$@"
}

run_script() { # folder of the package that must be imported, name of the run
    (
        cd "$out"
        "$environment/bin/python" - "$root/examples" "$1" "$2" <<'SCRIPT'
import sys
from pathlib import Path

import cooper_jax

examples, folder, name = sys.argv[1:]
imported = Path(cooper_jax.__file__).resolve().parent
assert imported == Path(folder).resolve(), f"imported {imported}, not {folder}"

sys.path.insert(0, examples)
import train_from_python

shortened = {"run_dir": name, "steps": 2, "supervised.policy_steps": 20, "supervised.reward_steps": 20}
result = train_from_python.main(train_from_python.SETTINGS | shortened)
assert [row["step"] for row in result.metrics] == [1, 2], result.metrics
SCRIPT
    )
}

# Built from a copy: a build writes beside the sources.
mkdir "$out/source"
cp -r cooper_jax kernels configs launch pyproject.toml README.md LICENSE "$out/source" # with symlinks as they are
pip install "$out/source"
packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
run_script "$packages/cooper_jax" installed

pip uninstall --yes cooper-jax
pip install --editable "$out/source"
run_script "$out/source/cooper_jax" editable
