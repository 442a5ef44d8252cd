# Shared by every script: strict mode, where things are, how to say something, how to stop.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${ID_VENV:-$ROOT/.venv}

say() { printf '%s | %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The installed command line: the repository's own environment first, then whatever is active.
intra_distillation() {
    if [ -x "$VENV/bin/intra-distillation" ]; then
        "$VENV/bin/intra-distillation" "$@"
    elif command -v intra-distillation >/dev/null 2>&1; then
        intra-distillation "$@"
    else
        die "the package is not installed: run  bash $ROOT/scripts/setup.sh  first"
    fi
}

# The same in place of the calling script, so that a signal sent to the script reaches the program.
exec_intra_distillation() {
    if [ -x "$VENV/bin/intra-distillation" ]; then exec "$VENV/bin/intra-distillation" "$@"; fi
    command -v intra-distillation >/dev/null 2>&1 && exec intra-distillation "$@"
    die "the package is not installed: run  bash $ROOT/scripts/setup.sh  first"
}
