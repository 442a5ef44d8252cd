#!/usr/bin/env bash
# Turns the WMT'17 English-German archives into a data folder for scripts/train.sh; -h lists the options.
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

exec_intra_distillation prepare-wmt17 "$@"
