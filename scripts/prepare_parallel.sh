#!/usr/bin/env bash
# Turns your own parallel text files into a data folder for scripts/train.sh; -h lists the options.
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

intra_distillation prepare-parallel "$@"
