#!/usr/bin/env bash
# `pip install .` and `pip install -e .`, each in an environment of its own.  In each, examples/train_from_python.py runs
# in a shortened form, and the console script starts, in a folder that knows no checkout.
#
#   .ci/installed.sh [ENVIRONMENT]        (of requirements.txt: the second takes the libraries from there)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
base=${1:+$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')}

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# The programs are compiled once for both, and quickly: they compute little.
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$out/xla XLA_FLAGS=--xla_backend_optimization_level=0

check() { # name, options of pip, folder of the package that must be imported ({packages}: the environment's), libraries
    local environment=$out/$1 source=$out/source_$1 packages imported expected last
    # A build writes beside the sources, so it gets a copy, with symlinks as they are.
    mkdir "$source"
    cp -r "$root"/{cooper_jax,kernels,configs,launch,pyproject.toml,README.md,LICENSE} "$source"
    python3 -m venv "$environment"
    [[ -z $4 ]] || echo "$4" >"$(echo "$environment"/lib/python*/site-packages)/libraries.pth"
    # shellcheck disable=SC2086 # options are words
    "$environment/bin/pip" install --quiet --disable-pip-version-check $2 "$source"

    mkdir "$out/work_$1"
    cd "$out/work_$1"
    packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    imported=$("$environment/bin/python" -c 'import cooper_jax; print(cooper_jax.__path__[0])')
    expected=${3//\{packages\}/$packages}
    [[ $imported == "${expected//\{source\}/$source}" ]] || { echo "installed: imported $imported" >&2; exit 1; }
    "$environment/bin/cooper-jax" --help >/dev/null

    sed -e 's/"steps": 8/"steps": 2/' -e 's/_steps": 300/_steps": 20/' "$root/examples/train_from_python.py" >script.py
    "$environment/bin/python" script.py
    last=$(tail -n 1 runs/from_python/metrics.jsonl)
    [[ $last == *'"step": 2,'* ]] || { echo "installed: the run ends with: $last" >&2; exit 1; }
}

check plain "" "{packages}/cooper_jax" ""
check editable "--editable" "{source}/cooper_jax" "$base"
