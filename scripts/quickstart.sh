#!/usr/bin/env bash
# Runs everything once, from installation to report, on synthetic brain tumours: see usage below.

set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/quickstart.sh [--workdir FOLDER] [--device cpu|cuda|mps] [--size small|gpu] [--python PYTHON] [--fresh]

Makes its own environment, writes a few synthetic brain tumour cases in BraTS's layout, converts them to an nnU-Net data
set, trains three models on them with nnUNetv2_train for four short epochs each (nnU-Net, nnU-Net with the optimiser
Muon, ConResNet with Muon), predicts held-out cases with nnUNetv2_predict, and compares the three in a report.

On two CPU cores it takes about 6 minutes after the installation. The cases are synthetic and the trainings are short:
the scores show that everything works, not how good a method is.

Run it again after an interruption and it continues, also within a training: checkpoints are written every 30 seconds.

  --workdir FOLDER  folder for data, models and report (default: quickstart, in the project's folder); also as the only
                    argument without a flag
  --device DEVICE   where to train and predict (default: cuda or mps if there is one, else cpu)
  --size SIZE       small: for a CPU. gpu: more and larger cases, longer epochs (default: gpu with cuda, else small)
  --python PYTHON   interpreter to make the environment with, 3.10 or newer (default: python3)
  --fresh           start over: remove what an earlier run left in the work folder (the environment is kept)
  -h, --help        print this
TEXT
}

DATASET_ID=501
DATASET=Dataset501_BraTS
CONFIGURATION=3d_fullres
FOLD=0
# The trainers are in scripts/quickstart_trainers; all use the same precision. The report uses these names.
TRAINERS=(nnUNetTrainerQuickstart nnUNetTrainerMuonQuickstart nnUNetTrainerConResNetQuickstart)
NAMES=("nnU-Net" "nnU-Net with Muon" "ConResNet")
STEPS=9

# In both sizes, images cover a head, about 192 x 192 x 144 mm. In the small size, the patch is the whole image.
choose_size() {
    SIZE="${SIZE:-$([ "$DEVICE" = cuda ] && echo gpu || echo small)}"
    case "$SIZE" in
        small)
            CASES=(-n 10 --held-out 3 --shape 28 28 21 --spacing 6.8 6.8 6.8 --seed 0)
            ITERATIONS=15
            ;;
        gpu)
            CASES=(-n 20 --held-out 5 --shape 128 128 96 --spacing 1.5 1.5 1.5 --seed 0)
            ITERATIONS=100
            ;;
    esac
    export QUICKSTART_ITERATIONS="$ITERATIONS"
}

fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    [ "$#" -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

main() {
    read_arguments "$@"
    local began=$SECONDS number
    trap 'printf "\nInterrupted; run the script again to continue.\n" >&2; exit 130' INT
    enter_work_folder

    heading 1 "Environment"
    set_up_environment
    step 02 phantoms "Synthetic BraTS cases" make_phantoms
    step 03 convert "Conversion to $DATASET" convert_phantoms
    step 04 preprocess "nnUNetv2_plan_and_preprocess" plan_and_preprocess
    for number in 0 1 2; do
        step "0$((5 + number))" "train-${TRAINERS[number]}" "nnUNetv2_train: ${NAMES[number]}" train "${TRAINERS[number]}"
    done
    step 08 predict "nnUNetv2_predict, held-out cases" predict
    step 09 compare "nnunet-conres compare" compare

    report
    printf '\nTotal time: %s\n' "$(duration $((SECONDS - began)))"
}

read_arguments() {
    WORK=""
    DEVICE=""
    SIZE=""
    FRESH=""
    while [ "$#" -gt 0 ]; do
        case "$1" in
            -h | --help)
                usage
                exit 0
                ;;
            --fresh) FRESH=yes ;;
            --workdir | --device | --size | --python)
                [ "$#" -ge 2 ] || fail "$1 needs a value; see --help."
                case "$1" in
                    --workdir) WORK="$2" ;;
                    --device) DEVICE="$2" ;;
                    --size) SIZE="$2" ;;
                    # _environment.sh reads this variable.
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
    case "$SIZE" in
        "" | small | gpu) ;;
        *) fail "--size is $SIZE; expected small or gpu." ;;
    esac
    PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    WORK="${WORK:-$PROJECT/quickstart}"
}

# Sets the paths of the work folder. Refuses a folder with other contents, since steps delete leftovers of earlier runs.
enter_work_folder() {
    local marker=".nnunet-conres-quickstart"
    mkdir -p "$WORK" || fail "cannot create the work folder $WORK."
    WORK="$(cd "$WORK" && pwd)"
    if [ ! -e "$WORK/$marker" ] && [ -n "$(ls -A "$WORK")" ]; then
        fail "$WORK is not empty and was not made by this script." "Choose another --workdir."
    fi
    : >"$WORK/$marker"
    lock_work_folder

    BRATS="$WORK/brats"
    REPORT="$WORK/report"
    LOGS="$WORK/logs"
    STAMPS="$WORK/steps_done"
    # Only for this script and its child processes; the caller's variables stay unchanged.
    export nnUNet_raw="$WORK/nnUNet_raw"
    export nnUNet_preprocessed="$WORK/nnUNet_preprocessed"
    export nnUNet_results="$WORK/nnUNet_results"
    export nnUNet_extTrainer="$PROJECT/scripts/quickstart_trainers"

    if [ -n "$FRESH" ]; then
        rm -rf "$BRATS" "$WORK/predictions" "$REPORT" "$LOGS" "$STAMPS" \
            "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"
    fi
    mkdir -p "$LOGS" "$STAMPS" "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"
    printf 'Work folder: %s\n' "$WORK"
}

# A second quickstart would delete files that the first one uses. The lock file contains the process id; a process that
# has ended does not count.
lock_work_folder() {
    local lock="$WORK/.lock" owner
    while ! (set -o noclobber && echo "$$" >"$lock") 2>/dev/null; do
        owner="$(cat "$lock" 2>/dev/null || true)"
        if [ -z "$owner" ] || kill -0 "$owner" 2>/dev/null; then
            fail "another quickstart${owner:+, process $owner,} works in $WORK." \
                "Wait until it has ended, or choose another --workdir." "If there is none, remove $lock."
        fi
        rm -f "$lock"
    done
    # shellcheck disable=SC2064
    trap "rm -f '$lock'" EXIT
}

set_up_environment() {
    local began=$SECONDS
    # shellcheck source=scripts/_environment.sh
    . "$PROJECT/scripts/_environment.sh" || fail "cannot set up an environment (see above)."
    setup_environment .venv-quickstart || fail "cannot set up the environment (see above)."
    choose_device
    choose_size
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

    # nnU-Net's defaults are 8 and 12 workers, which are slower than two on two cores. On a CPU, the training itself
    # needs the cores.
    export nnUNet_def_n_proc=2 nnUNet_n_proc_DA=1
    if [ "$DEVICE" != cpu ] && [ "$cores" -gt 2 ]; then
        nnUNet_n_proc_DA=$((cores > 6 ? 6 : cores - 1))
    fi
    # Compiling the network would take longer than it saves in a few epochs.
    export nnUNet_compile=false
    # Operations that PyTorch lacks on Apple's GPUs run on the CPU instead of ending the training.
    export PYTORCH_ENABLE_MPS_FALLBACK=1
    export PYTHONUNBUFFERED=1
}

# Every step below removes the leftovers of an interrupted run, except for the training, which resumes.

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

# model_folder TRAINER: the folder of the trained model.
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

# predictions TRAINER: the folder for the predictions of a model.
predictions() {
    printf '%s\n' "$WORK/predictions/$1"
}

predict() {
    rm -rf "$WORK/predictions"
    local trainer
    for trainer in "${TRAINERS[@]}"; do
        nnUNetv2_predict -i "$nnUNet_raw/$DATASET/imagesTs" -o "$(predictions "$trainer")" -d "$DATASET_ID" \
            -c "$CONFIGURATION" -f "$FOLD" -tr "$trainer" -device "$DEVICE" -npp 1 -nps 1
    done
}

compare() {
    rm -rf "$REPORT"
    local folders=() models=() number
    for number in "${!TRAINERS[@]}"; do
        folders+=("${NAMES[number]}=$(predictions "${TRAINERS[number]}")")
        models+=("${NAMES[number]}=$(model_folder "${TRAINERS[number]}")")
    done
    nnunet-conres compare -o "$REPORT" -np 2 --predictions "${folders[@]}" --model "${models[@]}" \
        --reference "$nnUNet_raw/$DATASET/labelsTs" -i "$nnUNet_raw/$DATASET/imagesTs" \
        -djfile "$(model_folder "${TRAINERS[0]}")/dataset.json"
}

heading() {
    printf '\n[%s/%s] %s\n' "$1" "$STEPS" "$2"
}

# step NUMBER NAME TITLE FUNCTION ARGUMENTS: runs the function unless an earlier run finished it; logs its output.
step() {
    local number="$1" name="$2" title="$3" began=$SECONDS status=0
    shift 3
    local log="$LOGS/$number-$name.log" stamp="$STAMPS/$number-$name" ticker=""
    heading "${number#0}" "$title"
    # The stamp contains everything the results depend on: with other cases or trainers, all steps run again.
    local recipe="${CASES[*]} $ITERATIONS $DATASET $CONFIGURATION $FOLD ${TRAINERS[*]}"
    if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$recipe" ]; then
        printf '    done before\n'
        return
    fi
    # Later steps used the earlier results of this step, so they run again. Numbers have two digits, to compare as text.
    local later
    for later in "$STAMPS"/*; do
        [ "$(basename "$later")" \< "$number" ] || rm -f "$later"
    done

    show_progress "$began" "$log" &
    ticker=$!
    # Not as a condition, where the shell would ignore failures inside the function.
    set +e
    (
        set -e
        "$@"
    ) >"$log" 2>&1
    status=$?
    set -e
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    [ ! -t 1 ] || printf '\r\033[K'
    if [ "$status" -ne 0 ]; then
        printf '    the last lines of its output:\n' >&2
        tail -n 15 "$log" | sed 's/^/    | /' >&2
        fail "step $number, $name, failed with exit code $status." "Its whole output: $log" \
            "Run the script again to continue."
    fi
    printf '%s\n' "$recipe" >"$stamp"
    printf '    %s (log: %s)\n' "$(duration $((SECONDS - began)))" "$log"
}

# show_progress BEGAN LOG: prints the elapsed time and, for a training, the progress line in its log, until the script
# ends. On a terminal it updates one line every second, elsewhere it prints a line every 30 seconds.
show_progress() {
    local line width tick=0 every=30
    [ ! -t 1 ] || every=1
    while sleep 1 && kill -0 $$ 2>/dev/null; do
        tick=$((tick + 1))
        [ $((tick % every)) -eq 0 ] || continue
        line="$(tail -n 1 "$2" 2>/dev/null | tr '\r' '\n' | grep -a '^Epoch .* left$' | tail -n 1 || true)"
        line="    $(duration $((SECONDS - $1)))${line:+  $line}"
        if [ -t 1 ]; then
            width="$(tput cols 2>/dev/null || echo 80)"
            printf '\r\033[K%s' "${line:0:width-1}"
        else
            printf '%s\n' "$line"
        fi
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
    printf '\nHeld-out cases:\n\n'
    # the table of the comparison: heading, rule, one line per model
    awk '/HD95 \(/ { table = 1 } table && /^$/ { exit } table { print "    " $0 }' "$LOGS/09-compare.log"
    printf '\nA few synthetic cases and short epochs: the scores show that everything works, not which network is better.\n'
    printf 'All three models have the same precision, epochs and cases; the one called nnU-Net has its own network and SGD.\n'
    printf '\nReport: %s\n' "$REPORT/report.html"
    cat <<TEXT

Now your own data, in this shell:

    . "$VIRTUAL_ENV/bin/activate"
    export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...   # existing folders
    nnunet-conres brats-convert -i /path/to/BraTS/training -d 502
    nnUNetv2_plan_and_preprocess -d 502 -c $CONFIGURATION --verify_dataset_integrity
    nnUNetv2_train 502 $CONFIGURATION 0 -tr nnUNetTrainerConResNet -device $DEVICE
TEXT
}

main "$@"
