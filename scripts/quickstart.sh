#!/usr/bin/env bash
# Everything once, from nothing to figures, on synthetic brain tumours: see usage below.

set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/quickstart.sh [--workdir FOLDER] [--device cpu|cuda|mps] [--python PYTHON] [--fresh]

Makes its own environment, writes a few synthetic brain tumour cases in BraTS's layout, converts them to an nnU-Net data
set, trains ConResNet and nnU-Net's own U-Net on them for one epoch each with nnUNetv2_train, predicts held-out cases
with nnUNetv2_predict, and compares the two and their ensemble in a report. Takes 15 to 30 minutes on two cores; a GPU is
used if there is one. The cases are synthetic and the trainings are short: the scores say that all works, not how good a
method is.

Run it again after an interruption and it goes on where it was, within the training too.

  --workdir FOLDER  folder for data, model and figures (default: quickstart, in the project's folder); also as the only
                    argument without a flag
  --device DEVICE   where to train and predict (default: cuda or mps if there is one, else cpu)
  --python PYTHON   interpreter to make the environment with, 3.10 or newer (default: python3)
  --fresh           begin anew: remove what an earlier run left in the work folder (the environment is kept)
  -h, --help        print this
TEXT
}

# Small enough that the epoch of 250 iterations takes minutes on two cores, and as large as a head: 4.2 mm voxels.
CASES=(-n 10 --held-out 3 --shape 44 44 34 --spacing 4.2 4.2 4.2 --seed 0)
DATASET_ID=501
DATASET=Dataset501_BraTS
CONFIGURATION=3d_fullres
FOLD=0
TRAINER=nnUNetTrainerConResNet_1epoch
# nnU-Net's own, for comparison. On a CPU it trains in float32, which the report says.
BASELINE=nnUNetTrainer_1epoch
STEPS=11

fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    [ "$#" -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

main() {
    read_arguments "$@"
    local began=$SECONDS
    trap 'printf "\nInterrupted; run the script again to go on from here.\n" >&2; exit 130' INT
    enter_work_folder

    heading 1 "Environment"
    set_up_environment
    step 02 phantoms "Made-up BraTS cases" make_phantoms
    step 03 convert "Conversion to $DATASET" convert_phantoms
    step 04 preprocess "nnUNetv2_plan_and_preprocess" plan_and_preprocess
    step 05 train "nnUNetv2_train, $TRAINER on $DEVICE (the longest step: minutes)" train "$TRAINER"
    step 06 predict "nnUNetv2_predict, held-out cases" predict "$TRAINER" "$PREDICTIONS"
    step 07 evaluate "nnUNetv2_evaluate_folder" evaluate
    step 08 figures "Figures" draw
    step 09 train-baseline "nnUNetv2_train, $BASELINE on $DEVICE (minutes)" train "$BASELINE"
    step 10 predict-baseline "nnUNetv2_predict, held-out cases" predict "$BASELINE" "$BASELINE_PREDICTIONS"
    step 11 compare "nnunet-conres compare" compare

    report
    printf '\nTotal time: %s\n' "$(duration $((SECONDS - began)))"
}

read_arguments() {
    WORK=""
    DEVICE=""
    FRESH=""
    while [ "$#" -gt 0 ]; do
        case "$1" in
            -h | --help)
                usage
                exit 0
                ;;
            --fresh) FRESH=yes ;;
            --workdir | --device | --python)
                [ "$#" -ge 2 ] || fail "$1 needs a value; see --help."
                case "$1" in
                    --workdir) WORK="$2" ;;
                    --device) DEVICE="$2" ;;
                    # Where _environment.sh looks for it.
                    --python) export PYTHON="$2" ;;
                esac
                shift
                ;;
            -*) fail "unknown option $1; see --help." ;;
            *)
                [ -z "$WORK" ] || fail "unexpected argument $1; see --help."
                WORK="$1"
                ;;
        esac
        shift
    done
    case "$DEVICE" in
        "" | cpu | cuda | mps) ;;
        *) fail "--device is $DEVICE; expected cpu, cuda or mps." ;;
    esac
    PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    WORK="${WORK:-$PROJECT/quickstart}"
}

# Sets the folder's paths. Refuses a folder with other things in it, since steps delete what an earlier try left behind.
enter_work_folder() {
    local marker=".nnunet-conres-quickstart"
    mkdir -p "$WORK" || fail "cannot create the work folder $WORK."
    WORK="$(cd "$WORK" && pwd)"
    if [ ! -e "$WORK/$marker" ] && [ -n "$(ls -A "$WORK")" ]; then
        fail "$WORK is not empty and was not made by this script." "Choose another --workdir."
    fi
    : >"$WORK/$marker"

    BRATS="$WORK/brats"
    PREDICTIONS="$WORK/predictions"
    BASELINE_PREDICTIONS="$WORK/predictions_nnunet"
    REPORT="$WORK/report"
    FIGURES="$WORK/figures"
    LOGS="$WORK/logs"
    STAMPS="$WORK/steps_done"
    # Only for this script and what it starts; the caller's own folders stay what they are.
    export nnUNet_raw="$WORK/nnUNet_raw"
    export nnUNet_preprocessed="$WORK/nnUNet_preprocessed"
    export nnUNet_results="$WORK/nnUNet_results"
    MODEL="$(model_folder "$TRAINER")"
    # Evaluation writes the name of every file into it, so it stands beside them.
    SUMMARY="$PREDICTIONS/summary.json"

    if [ -n "$FRESH" ]; then
        rm -rf "$BRATS" "$PREDICTIONS" "$BASELINE_PREDICTIONS" "$FIGURES" "$REPORT" "$LOGS" "$STAMPS" \
            "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"
    fi
    mkdir -p "$LOGS" "$STAMPS" "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"
    printf 'Work folder: %s\n' "$WORK"
}

set_up_environment() {
    local began=$SECONDS
    # shellcheck source=scripts/_environment.sh
    . "$PROJECT/scripts/_environment.sh" || fail "cannot set up an environment (see above)."
    setup_environment .venv-quickstart || fail "cannot set up the environment (see above)."
    choose_device
    printf '    %s, device %s: %s\n' "$VIRTUAL_ENV" "$DEVICE" "$(duration $((SECONDS - began)))"
}

choose_device() {
    local available cores
    available="$("$VENV_PYTHON" -c 'import os, torch
cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
print("cuda" * cuda, "mps" * mps, "cpu", os.cpu_count() or 1)')" || fail "PyTorch cannot be imported (see above)."
    cores="${available##* }"
    # shellcheck disable=SC2086
    set -- $available
    DEVICE="${DEVICE:-$1}"
    case " ${available% *} " in
        *" $DEVICE "*) ;;
        *) fail "--device $DEVICE: PyTorch finds no such device here." "Use --device $1, or leave the option out." ;;
    esac

    # nnU-Net starts 8 and 12 workers otherwise, which on two cores are slower than two. On a CPU the training itself
    # needs the cores.
    export nnUNet_def_n_proc=2 nnUNet_n_proc_DA=1
    if [ "$DEVICE" != cpu ] && [ "$cores" -gt 2 ]; then
        nnUNet_n_proc_DA=$((cores > 6 ? 6 : cores - 1))
    fi
    # Compiling the network would take longer than it saves in one epoch.
    export nnUNet_compile=false
    # Operations that PyTorch lacks on Apple's GPUs run on the CPU instead of ending the training.
    export PYTORCH_ENABLE_MPS_FALLBACK=1
    export PYTHONUNBUFFERED=1
}

# Every step below removes what an earlier, interrupted try of it may have left, except for the training, which goes on.

make_phantoms() {
    rm -rf "$BRATS"
    nnunet-conres phantom -o "$BRATS" "${CASES[@]}"
}

convert_phantoms() {
    rm -rf "${nnUNet_raw:?}/$DATASET"
    nnunet-conres brats-convert -i "$BRATS/training" --held-out "$BRATS/held_out" -d "$DATASET_ID" -np 2
}

plan_and_preprocess() {
    rm -rf "${nnUNet_preprocessed:?}/$DATASET" "${nnUNet_results:?}/$DATASET"
    nnUNetv2_plan_and_preprocess -d "$DATASET_ID" -c "$CONFIGURATION" --verify_dataset_integrity -npfp 2 -np 2
}

# model_folder TRAINER: where nnU-Net puts what it trains.
model_folder() {
    printf '%s\n' "$nnUNet_results/$DATASET/$1__nnUNetPlans__$CONFIGURATION"
}

# train TRAINER
train() {
    local trainer="$1" model checkpoint
    model="$(model_folder "$trainer")"
    for checkpoint in "$model/fold_$FOLD"/checkpoint_*.pth; do
        if [ -e "$checkpoint" ]; then
            printf 'Going on from the latest checkpoint in %s\n' "$model/fold_$FOLD"
            nnUNetv2_train "$DATASET_ID" "$CONFIGURATION" "$FOLD" -tr "$trainer" -device "$DEVICE" --c
            return
        fi
    done
    rm -rf "$model"
    nnUNetv2_train "$DATASET_ID" "$CONFIGURATION" "$FOLD" -tr "$trainer" -device "$DEVICE"
}

# predict TRAINER FOLDER: with probabilities, which the ensemble needs.
predict() {
    rm -rf "$2"
    nnUNetv2_predict -i "$nnUNet_raw/$DATASET/imagesTs" -o "$2" -d "$DATASET_ID" -c "$CONFIGURATION" \
        -f "$FOLD" -tr "$1" -device "$DEVICE" -npp 1 -nps 1 --save_probabilities
}

evaluate() {
    nnUNetv2_evaluate_folder "$nnUNet_raw/$DATASET/labelsTs" "$PREDICTIONS" -o "$SUMMARY" -np 2 \
        -djfile "$MODEL/dataset.json" -pfile "$MODEL/plans.json"
    nnunet-conres summary "$SUMMARY" -djfile "$MODEL/dataset.json"
}

draw() {
    rm -rf "$FIGURES"
    nnunet-conres overlay -i "$nnUNet_raw/$DATASET/imagesTs" -p "$PREDICTIONS" -ref "$nnUNet_raw/$DATASET/labelsTs" \
        -djfile "$MODEL/dataset.json" -o "$FIGURES"
}

compare() {
    rm -rf "$REPORT"
    nnunet-conres compare -o "$REPORT" -np 2 \
        --predictions "nnU-Net=$BASELINE_PREDICTIONS" "ConResNet=$PREDICTIONS" \
        --model "nnU-Net=$(model_folder "$BASELINE")" "ConResNet=$MODEL" \
        --reference "$nnUNet_raw/$DATASET/labelsTs" -i "$nnUNet_raw/$DATASET/imagesTs" -djfile "$MODEL/dataset.json"
}

heading() {
    printf '\n[%s/%s] %s\n' "$1" "$STEPS" "$2"
}

# step NUMBER NAME TITLE FUNCTION ARGUMENTS: runs the function unless an earlier run finished it, its output in a log.
step() {
    local number="$1" name="$2" title="$3" began=$SECONDS status=0
    shift 3
    local log="$LOGS/$number-$name.log" stamp="$STAMPS/$number-$name" ticker=""
    heading "${number#0}" "$title"
    # The stamp holds what the results depend on: with other cases or another trainer all is done anew.
    local recipe="${CASES[*]} $DATASET $CONFIGURATION $FOLD $TRAINER $BASELINE"
    if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$recipe" ]; then
        printf '    done before\n'
        return
    fi
    # Later steps used this one's earlier results. Numbers have two digits.
    local later
    for later in "$STAMPS"/*; do
        [ "$(basename "$later")" \< "$number" ] || rm -f "$later"
    done

    if [ -t 1 ]; then
        show_elapsed "$began" &
        ticker=$!
    fi
    # Not as a condition, where the shell would ignore failures inside the function.
    set +e
    (
        set -e
        "$@"
    ) >"$log" 2>&1
    status=$?
    set -e
    if [ -n "$ticker" ]; then
        kill "$ticker" 2>/dev/null || true
        wait "$ticker" 2>/dev/null || true
        printf '\r'
    fi
    if [ "$status" -ne 0 ]; then
        printf '    the last lines of its output:\n' >&2
        tail -n 15 "$log" | sed 's/^/    | /' >&2
        fail "step $number, $name, failed with exit code $status." "Its whole output: $log" \
            "Run the script again to go on from here."
    fi
    printf '%s\n' "$recipe" >"$stamp"
    printf '    %s (log: %s)\n' "$(duration $((SECONDS - began)))" "$log"
}

# Counts the seconds on the terminal for as long as the script lives.
show_elapsed() {
    while kill -0 $$ 2>/dev/null; do
        printf '\r    %s ' "$(duration $((SECONDS - $1)))"
        sleep 1
    done
}

duration() {
    if [ "$1" -ge 60 ]; then
        printf '%d min %02d s' $(($1 / 60)) $(($1 % 60))
    else
        printf '%d s' "$1"
    fi
}

report() {
    local file
    printf '\nHeld-out cases, scores of ConResNet per region:\n\n'
    nnunet-conres summary "$SUMMARY" -djfile "$MODEL/dataset.json" | sed 's/^/    /'
    printf '\nComparison with nnU-Net, made with these models:\n\n'
    # what nnU-Net prints on the way is in the log as well
    sed -n '/HD95/,$p' "$LOGS/11-compare.log" | sed 's/^/    /'
    printf '\nFigures:\n'
    for file in "$FIGURES"/*.png "$MODEL/fold_$FOLD"/progress_conres.png; do
        [ ! -e "$file" ] || printf '    %s\n' "$file"
    done
    printf '\nModel:       %s\nPredictions: %s\nScores:      %s\n' "$MODEL" "$PREDICTIONS" "$SUMMARY"
}

main "$@"
