#!/usr/bin/env bash
# Adaptive against constant alpha' (Figure 7 of the paper): runs, table and figure; -h lists the options:
#   scripts/ablation_alpha.sh DATA --config CONFIG --results DIR [--seeds 1 2 3] [--method id_x]
#       [--no-baseline] [-- any fairseq-train flags]
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
exec_intra_distillation ablation alpha "$@"
