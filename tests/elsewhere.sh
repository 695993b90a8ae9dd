#!/usr/bin/env bash
# The core's laws with the oldest dependencies that pyproject.toml allows, and on every other Python that is here.
#
#     tests/elsewhere.sh [PYTEST ARGUMENT ...]     default: -m quick, then the merged files; needs a network, leaves nothing
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

declare -A installs # name -> process; they run side by side
install() { # NAME PYTHON REQUIREMENT ...
    local name=$1 python=$2
    shift 2
    { "$python" -m venv "$work/$name" && "$work/$name/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; } &
    installs[$name]=$!
}

installed() { # NAME
    wait "${installs[$1]}"
    "$work/$1/bin/python" -c 'import sys, numpy; print(f"Python {sys.version.split()[0]}, NumPy {numpy.__version__}")'
}

oldest() { # every requirement of the package and its tests, at its lower bound
    python3 - <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*(r.replace(">=", "==") for r in [*project["dependencies"], *project["optional-dependencies"]["test"]]))
PYTHON
}

laws=("$@")
check() { # PYTHON [PYTEST ARGUMENT ...]
    if [ ${#laws[@]} -gt 0 ]; then
        "$1" -m pytest -q -p no:cacheprovider "${@:2}" "${laws[@]}"
        return
    fi
    "$1" -m pytest -q -p no:cacheprovider "${@:2}" -m quick
    "$1" -m pytest -q -p no:cacheprovider "${@:2}" tests/merging/test_merging_llama.py
}

# shellcheck disable=SC2046
install oldest python3 $(oldest)
others=()
for version in 3.12 3.13 3.14; do
    python=$(command -v "python$version" || true)
    found=$(PYENV_VERSION=$(pyenv latest "$version" 2>/dev/null || true) "${python:-false}" -c 'import sys; print(sys.executable)' 2>/dev/null || true)
    if [ -z "$found" ]; then
        echo "Python $version is not here"
        continue
    fi
    install "$version" "$found" -e ".[test]"
    others+=("$version")
done

installed oldest
# what these old ones need is new, and they use it in ways that it warns of
PYTHONPATH=$PWD check "$work/oldest/bin/python" -W ignore::DeprecationWarning
for version in "${others[@]}"; do
    installed "$version"
    check "$work/$version/bin/python"
done
