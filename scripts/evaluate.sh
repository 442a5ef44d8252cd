#!/usr/bin/env bash
# Translate the test set with a run's checkpoint and score it with SacreBLEU:
#   scripts/evaluate.sh RUN_DIR [--data DATA] [--checkpoint best|last|averageN] [--cpu] [--force]
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
exec_intra_distillation evaluate "$@"
