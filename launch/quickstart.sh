#!/usr/bin/env bash
# The paper's whole story on a laptop, in minutes: a text LM, a reference fine-tuned from it, a score for every caption token, a
# small vision tower, and two vision-language models, one without an encoder (U-LVLM) and one with it (H-LVLM), each pre-trained
# twice on the same batches, with next-token prediction and with PRIOR; then all of them as Hugging Face folders, and a report.
#   bash launch/quickstart.sh                       on scenes that it renders itself (the truth is known per word)
#   bash launch/quickstart.sh --data PATH...        on your own pairs: WebDataset tars, or jsonl with an image folder
#   bash launch/quickstart.sh --seeds 3             repeats the comparison; one seed cannot tell luck from effect
#   bash launch/quickstart.sh --out DIR             another folder (default: runs/quickstart)
#   bash launch/quickstart.sh --fast                a few steps a stage: every stage runs, nothing is learned
# Stopped? Repeat the command: every stage goes on where it was.
set -euo pipefail

data=() seeds=1 out=runs/quickstart steps=() scenes=() unit=8192
while [ $# -gt 0 ]; do
    case $1 in
        --data) while [ $# -gt 1 ] && [[ $2 != --* ]]; do data+=("$(realpath -e -- "$2")"); shift; done ;;
        --seeds) seeds=${2:?a number}; shift ;;
        --fast)
            unit=512 steps=(steps=8 optim.warmup_steps=2 save_every=4 data.batch_size=8)
            scenes=(--pairs 1200 --heldout 40 --reference 400 --text 600 --probe 40 --tower 200) ;;
        --out) out=$(realpath -m -- "${2:?a folder}"); shift ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "quickstart: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
    shift
done
typed="bash launch/quickstart.sh${data[*]:+ --data ${data[*]}} --seeds $seeds"
source "$(dirname "$0")/venv.sh"
mkdir -p "$out"

say() { printf '\n== %s ==\n' "$*" >&2; }
timed() { python launch/timed.py "$out/times.jsonl" "$@"; }
train() { megaprior train "launch/configs/quickstart/$1.yaml" "out=$out/$2" "${@:3}" "${steps[@]}"; }
build() { # NAME INPUT... -- OPTION...: one folder of shards; one that is finished already is kept
    local name=$1 inputs=(); shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do inputs+=("$1"); shift; done
    timed "build $name" megaprior-data build --input "${inputs[@]}" --output "$out/shards/$name" \
        --tokenizer "$out/tokenizer" "${@:2}"
}
tokenizer() {
    [ -e "$out/tokenizer" ] || timed "train tokenizer" megaprior-data train-tokenizer --input "$@" \
        --output "$out/tokenizer" --vocab-size "$vocabulary"
}

if [ ${#data[@]} -eq 0 ]; then
    say "1. Scenes with captions: the truth is known per word"
    [ -e "$out/scenes" ] || timed "make scenes" megaprior-data make-scenes --output "$out/scenes" "${scenes[@]}"
    say "2. Tokenizer and shards, every byte verified"
    text=text mix=(data.text.0.path="$out/shards/text") vocabulary=1000 corpus=("$out/scenes/text.txt.gz" "$out/scenes/reference.txt.gz")
    tokenizer "${corpus[@]}"
    build text "${corpus[0]}"
    build reference "${corpus[1]}"
    build pairs "$out/scenes/pairs"
    build heldout "$out/scenes/heldout"
    build tower "$out/scenes/tower"
else
    say "1. Your pairs, cut into three parts that share no image"
    say "2. Tokenizer and shards, every byte verified"
    # No general text is at hand: the text LM learns from the reference's captions, and nothing is mixed in (docs/decisions.md).
    text=reference mix=(data.text=[]) vocabulary=4000
    tokenizer "${data[@]}"
    build reference "${data[@]}" -- --text --subset 0:0.4
    build tower "${data[@]}" -- --subset 0:0.4
    build pairs "${data[@]}" -- --subset 0.4:0.9
    build heldout "${data[@]}" -- --subset 0.9:1
fi
timed "verify" megaprior-data verify "$out"/shards/*

say "3. A small text LM, the reference fine-tuned from it on captions of other images, and a vision tower from yet others"
train textlm textlm "data.train.0.path=$out/shards/$text"
train reference reference "data.train.0.path=$out/shards/reference" "model.init=$out/textlm"
train clip tower "data.train.0.path=$out/shards/tower"

say "4. A score for every caption token; one of two processes is killed on the way and the command repeated"
score() { timed "score $1" megaprior score --model "$out/reference" --shards "$out/shards/$1" --unit-tokens $unit "${@:2}"; }
a_scorer() { # the process id of one of this folder's scorers
    local process
    for process in /proc/[0-9]*; do
        if tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -q "megaprior.score.worker.*$out/"; then
            echo "${process#/proc/}" && return
        fi
    done
    return 1
}
ledger=$out/shards/pairs/.score-ref_logprob
if [ ! -e "$out/shards/pairs/00000.ref_logprob.json" ] && [ ! -e "$ledger" ]; then
    score pairs --processes 2 & scoring=$!
    until victim=$(a_scorer) || ! kill -0 $scoring 2>/dev/null; do sleep 0.1; done
    until compgen -G "$ledger/*.npy" >/dev/null || ! kill -0 $scoring 2>/dev/null; do sleep 0.02; done
    kill -KILL "$victim" 2>/dev/null || true
    wait $scoring || echo "quickstart: the scorer lost a process and stopped with exit code $?; repeating the command" >&2
fi
score pairs --processes 2
score heldout

lvlm() { # FAMILY OPTION...: with NTP, then with PRIOR
    local method
    for method in ntp prior; do
        train "$1" "$1_${method}_seed$seed" "seed=$seed" "weighting.kind=$method" "model.init=$out/textlm" \
            "data.train.0.path=$out/shards/pairs" "data.heldout=$out/shards/heldout" "${@:2}"
    done
}
for ((seed = 0; seed < seeds; seed++)); do
    say "5. Vision-language models, seed $seed: next-token prediction, then PRIOR, on the same batches"
    lvlm ulvlm "${mix[@]}"
    lvlm hlvlm "model.tower.init=$out/tower"
done

say "6. What did they learn to see?"
probe=() runs=()
if [ -e "$out/scenes" ]; then
    probe=(--probe "$out/scenes/probe/probe.jsonl" --output "$out/results.jsonl")
    megaprior evaluate --model "$out/reference" "${probe[@]}"
fi
timed "evaluate tower" megaprior evaluate --model "$out/tower" --shards "$out/shards/heldout"
for ((seed = 0; seed < seeds; seed++)); do
    for name in {ulvlm,hlvlm}_{ntp,prior}; do
        run=$out/${name}_seed$seed
        runs+=(--run "${name/_/.}=$run")
        timed "evaluate $name seed $seed" megaprior evaluate --model "$run" --shards "$out/shards/heldout" "${probe[@]}"
    done
done

say "7. Models as Hugging Face folders, which transformers reads without us"
export_model() { # RUN NAME
    [ -e "$out/export/$2" ] || timed "export $2" megaprior export "$out/$1" --output "$out/export/$2"
}
export_model reference reference
for name in {ulvlm,hlvlm}_{ntp,prior}; do export_model "${name}_seed0" "$name"; done

say "8. The report"
[ ${#probe[@]} -eq 0 ] || probe=(--probe "$out/results.jsonl")
megaprior report --output "$out/report.html" --results "$out/results.json" --shards "$out/shards/pairs" \
    --heldout "$out/shards/heldout" "${runs[@]}" --stage "text LM=$out/textlm" --stage "reference=$out/reference" \
    --stage "tower=$out/tower" "${probe[@]}" --times "$out/times.jsonl" --command "$typed"
