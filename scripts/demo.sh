#!/usr/bin/env bash
# From nothing to a scored model with intra-distillation beside a plain one, without a network once installed.
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

OUT=$ROOT/runs/demo
SEED=1
# The whole demo: text that takes minutes to learn. Flags of the trainings come from configs/demo.yaml alone.
TRAIN=8000 TEST=320 VOCAB=1000 FLAGS=()

usage() {
    cat <<USAGE
usage: bash scripts/demo.sh [--out DIR] [--seed N] [--quick] [-h]
Installs, invents a small language pair, prepares it as IWSLT'14 is prepared, trains 'transformer' and 'id_x' on it side by
side (one CPU core each), translates and scores the test set, prints a table and draws the training curves.
  --out DIR   where everything goes (default: runs/demo)
  --seed N    names the language, its text and the models' start (default: 1)
  --quick     a tiny run that only shows that everything works: nothing is learnt
A second call goes on where the first one stopped. The scripts it uses work on your own text in the same way.
USAGE
}
value() { [ "$#" -ge 2 ] || die "$1 needs a value: see bash scripts/demo.sh -h"; printf '%s' "$2"; }
while [ "$#" -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --out) OUT=$(value "$@"); shift 2 ;;
        --seed) SEED=$(value "$@"); shift 2 ;;
        --quick)
            TRAIN=400 TEST=24 VOCAB=250
            FLAGS=(--max-update 30 --warmup-updates 10 --validate-interval-updates 10 --save-interval-updates 10)
            shift ;;
        *) die "demo.sh does not know '$1': see bash scripts/demo.sh -h" ;;
    esac
done
[[ $SEED =~ ^[0-9]{1,9}$ ]] || die "--seed '$SEED': must be a whole number from 0 to 999999999"
[ ! -e "$OUT" ] || [ -d "$OUT" ] || die "--out '$OUT' is a file: give a folder"

bash "$ROOT/scripts/setup.sh"
SECONDS=0
DATA=$OUT/data/de-en
# One thread each: the two trainings run side by side and share the cores.
export OMP_NUM_THREADS=1

# both COMMAND...: runs `COMMAND... METHOD` for both methods at once. The slower one has the progress bar, the other one
# prints a line now and then. Ctrl-C or a kill is passed on, and each stops where it can go on later; setsid keeps the
# terminal's own Ctrl-C from reaching them too, as a second signal means "at once".
both() {
    local first second status=0 pid
    "$@" transformer 2> >(while IFS= read -r line; do printf '%s\n' "$line" >&2; done) &
    first=$!
    "$@" id_x &
    second=$!
    # shellcheck disable=SC2064  # the two numbers as they are now
    trap "kill -TERM $first $second 2>/dev/null; wait; exit 130" INT TERM HUP
    for pid in "$first" "$second"; do
        wait "$pid" || status=$?
    done
    trap - INT TERM HUP
    [ "$status" -eq 0 ] || exit "$status"
}
# The CPU even where there is a GPU, so that the numbers are alike everywhere.
train() {
    exec setsid bash "$ROOT/scripts/train.sh" "$DATA" --method "$1" --config "$ROOT/configs/demo.yaml" \
        --save-dir "$OUT/$1" --seed "$SEED" -- --cpu "${FLAGS[@]}"
}
evaluate() { exec setsid bash "$ROOT/scripts/evaluate.sh" "$OUT/$1" --cpu; }

say "demo 1/5: invent a language pair"
intra_distillation demo-archive --out "$OUT/2014-01.tgz" --seed "$SEED" --train "$TRAIN" --test "$TEST"
say "demo 2/5: prepare it as IWSLT'14 is prepared"
bash "$ROOT/scripts/prepare_iwslt14.sh" --langs de --archive "$OUT/2014-01.tgz" --out "$OUT/data" --vocab-size "$VOCAB"
say "demo 3/5: train transformer and id_x"
both train
say "demo 4/5: translate and score the test set"
both evaluate
say "demo 5/5: table and curves"
printf '\n'
intra_distillation demo-report --data "$DATA" --runs "$OUT/transformer" "$OUT/id_x" --out "$OUT"
say "demo: complete in $SECONDS s after the installation"
