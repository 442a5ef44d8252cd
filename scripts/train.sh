#!/usr/bin/env bash
# Train one method of a config on a prepared data folder, or go on with it:
#   scripts/train.sh DATA --method {transformer,id_x,id_js} --config configs/NAME --save-dir DIR
#       [--seed N] [--precision auto|fp32|fp16|bf16] [--verbose] [-- any fairseq-train flags]
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
exec_intra_distillation train "$@"
