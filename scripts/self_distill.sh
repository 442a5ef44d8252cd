#!/usr/bin/env bash
# Table 1 of the paper: a baseline, then students that learn from the round before them; -h lists the options:
#   scripts/self_distill.sh DATA [--rounds 2] [--config CONFIG] [--results DIR] [--baseline RUN_DIR] [--student id_x]
#       [--seed 1] [--skip-sensitivity] ... [-- any fairseq-train flags]
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
exec_intra_distillation self-distill "$@"
