#!/usr/bin/env bash
# Turns the IWSLT'14 archive into a data folder for each language pair; -h lists the options.
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

intra_distillation prepare-iwslt14 "$@"
