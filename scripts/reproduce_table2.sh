#!/usr/bin/env bash
# Table 2 of the paper (IWSLT'14, eight languages into English) from the archive to the table; -h lists the options:
#   scripts/reproduce_table2.sh [--archive 2014-01.tgz] [--langs "de es"] [--methods "transformer id_x"] [--seeds "1 2 3"]
#       [--gpus N] [--results DIR] ... [-- any fairseq-train flags]
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
bash "$ROOT/scripts/setup.sh"
exec_intra_distillation reproduce --table 2 "$@"
