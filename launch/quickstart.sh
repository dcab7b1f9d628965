#!/usr/bin/env bash
# The paper's whole story on a laptop, in minutes: a text LM, a reference fine-tuned from it, a score for every caption token,
# and an encoder-free vision-language model pre-trained twice on the same batches, with next-token prediction and with PRIOR.
#   bash launch/quickstart.sh                       on scenes that it renders itself (the truth is known per word)
#   bash launch/quickstart.sh --data PATH...        on your own pairs: WebDataset tars, or jsonl with an image folder
#   bash launch/quickstart.sh --seeds 3             repeats the comparison; one seed cannot tell luck from effect
#   bash launch/quickstart.sh --out DIR             another folder (default: runs/quickstart)
# Stopped? Repeat the command: every stage goes on where it was.
set -euo pipefail

data=() seeds=1 out=runs/quickstart here=$PWD
while [ $# -gt 0 ]; do
    case $1 in
        --data)
            while [ $# -gt 1 ] && [[ $2 != --* ]]; do data+=("$(realpath -- "$2")"); shift; done ;;
        --seeds) seeds=$2; shift ;;
        --out) out=$(realpath -m -- "$2"); shift ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "quickstart: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
    shift
done
source "$(dirname "$0")/venv.sh"

say() { printf '\n== %s ==\n' "$*" >&2; }
config=launch/configs/quickstart
