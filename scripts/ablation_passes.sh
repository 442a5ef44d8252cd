#!/usr/bin/env bash
# Numbers of passes (Figure 8 of the paper): runs, table and figure; -h lists the options:
#   scripts/ablation_passes.sh DATA --config CONFIG --results DIR [--passes 2 3 4 5 6] [--seeds 1 2 3] [--method id_x]
#       [--no-baseline] [-- any fairseq-train flags]
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
exec_intra_distillation ablation passes "$@"
