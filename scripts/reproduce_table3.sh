#!/usr/bin/env bash
# Table 3 of the paper (WMT'17 English-German) from the archives to the table; -h lists the options:
#   scripts/reproduce_table3.sh [--archives DIR] [--methods "transformer id_x"] [--seeds "1"] [--gpus N] [--gpus-per-cell N]
#       [--results DIR] [--prepare-flags "..."] ... [-- any fairseq-train flags]
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
bash "$ROOT/scripts/setup.sh"
exec_intra_distillation reproduce --table 3 "$@"
