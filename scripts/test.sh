#!/usr/bin/env bash
# Installs if needed, lints, and runs the tests; arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

bash "$ROOT/scripts/setup.sh"
cd "$ROOT" || exit

# Tools are called as modules: one that the base interpreter already had has no script in this environment.
say "lint: ruff"
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
say "lint: shell scripts"
for script in scripts/*.sh scripts/lib/*.sh scripts/launch/*.sbatch .ci/run; do bash -n "$script"; done
if [ -x "$VENV/bin/shellcheck" ]; then
    "$VENV/bin/shellcheck" --external-sources --exclude=SC1091 scripts/*.sh scripts/lib/*.sh scripts/launch/*.sbatch .ci/run
else
    say "shellcheck is not installed: scripts are only parsed"
fi

say "tests"
# One thread per process: the models are tiny, and bit-exact comparisons need equal thread counts. TEST_PROCESSES says how
# many tests run at once.
OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile --durations=10 "$@"
