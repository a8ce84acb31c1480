#!/usr/bin/env bash
# Runs the workflow with a real SLURM on this machine: see usage below.

set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/test_slurm.sh [--workdir FOLDER] [--environment FOLDER] [--iterations N] [--sequential]

Installs Debian's slurm-wlm and munge where they are missing, starts a cluster of this one machine with a separate
configuration, and runs a small experiment on synthetic cases through it with `nnunet-conres workflow --profile slurm`: two
models in two folds, one short epoch each. One training is killed by scancel in the middle of its epoch. Then checks
that it was completed from its checkpoint, that all is done and reported, and that a second run has nothing to do.
Ends all that it has started. Needs root and Debian or Ubuntu; about 10 minutes on two cores.

  --workdir FOLDER      where all files go (default: a new folder in $TMPDIR or /tmp; kept)
  --environment FOLDER  a virtual environment with nnunet-conres[workflow] to use instead of making one
  --iterations N        iterations of an epoch (default: 10 for nnU-Net, 40 for ConResNet): with trainings of seconds,
                        starting jobs takes most of the time
  --sequential          afterwards run the same commands one after another, without workflow and SLURM, and compare the
                        wall times, which takes as long again; the machine should have nothing else to do
  -h, --help            print this
TEXT
}

WORK="" ENVIRONMENT="" ITERATIONS="" SEQUENTIAL="" LINKED=""
STARTED=()

fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    [ "$#" -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

main() {
    read_arguments "$@"
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    [ "$(id -u)" -eq 0 ] || fail "SLURM's daemons are started here, which takes root."
    set_up_environment
    install_slurm
    start_cluster
    make_experiment

    heading "The experiment, through SLURM"
    local began=$SECONDS status=0 load
    load="$(cut -d ' ' -f 1 /proc/loadavg)"
    kill_a_training &
    local killer=$!
    STARTED+=("$killer")
    # in the background: in the foreground, signals to this script would wait until it ends
    workflow >"$WORK/workflow.log" 2>&1 &
    RUNNING=$!
    wait "$RUNNING" || status=$?
    RUNNING=""
    local slurm_seconds=$((SECONDS - began))
    job_table
    if [ "$status" -ne 0 ]; then
        tail -n 30 "$WORK/workflow.log" >&2
        fail "the workflow ended with exit code $status; see $WORK/workflow.log"
    fi
    wait "$killer" || fail "no training could be killed in mid-epoch; see $WORK/workflow.log"
    check_recovery
    check_all_is_done
    if [ -n "$SEQUENTIAL" ]; then
        run_sequentially "$slurm_seconds" "$load"
    fi
    printf '\nAll is well. Wall time through SLURM: %s s. Files: %s\n' "$slurm_seconds" "$WORK"
}

read_arguments() {
    while [ "$#" -gt 0 ]; do
        case "$1" in
            -h | --help)
                usage
                exit 0
                ;;
            --sequential) SEQUENTIAL=yes ;;
            --workdir | --environment | --iterations)
                [ "$#" -ge 2 ] || fail "$1 needs a value; see --help."
                case "$1" in
                    --workdir) WORK="$2" ;;
                    --environment) ENVIRONMENT="$2" ;;
                    --iterations)
                        [[ "$2" =~ ^[1-9][0-9]+$ ]] || fail "--iterations is $2; expected a number, 10 or more."
                        ITERATIONS="$2"
                        ;;
                esac
                shift
                ;;
            *) fail "unknown argument $1; see --help." ;;
        esac
        shift
    done
    PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    WORK="${WORK:-$(mktemp -d "${TMPDIR:-/tmp}/nnunet-conres-slurm.XXXXXX")}"
    mkdir -p "$WORK"
    WORK="$(cd "$WORK" && pwd)"
    [ -z "$(ls -A "$WORK")" ] || fail "$WORK is not empty." "Choose another --workdir."
}

heading() {
    printf '\n== %s\n' "$1"
}

set_up_environment() {
    if [ -n "$ENVIRONMENT" ]; then
        [ -x "$ENVIRONMENT/bin/nnunet-conres" ] || fail "$ENVIRONMENT is no virtual environment with nnunet-conres."
        PATH="$(cd "$ENVIRONMENT" && pwd)/bin:$PATH"
        export PATH
    else
        # shellcheck source=scripts/_environment.sh
        . "$PROJECT/scripts/_environment.sh"
        setup_environment .venv-workflow workflow
    fi
}

install_slurm() {
    local command missing=""
    for command in munged slurmctld slurmd sbatch; do
        command -v "$command" >/dev/null 2>&1 || missing="$missing $command"
    done
    [ -n "$missing" ] || return 0
    heading "Installing slurm-wlm and munge"
    export DEBIAN_FRONTEND=noninteractive
    {
        apt-get update --quiet
        apt-get install --quiet --yes --no-install-recommends slurm-wlm munge
    } >"$WORK/apt.log" 2>&1 || fail "the installation failed; see $WORK/apt.log"
}

# Socket paths have a length limit, so the daemons' sockets lie in a separate folder with a short path.
start_cluster() {
    heading "A cluster of this machine"
    local host cluster="$WORK/cluster" cores memory
    host="$(hostname -s)"
    # nproc would count OMP_NUM_THREADS
    cores="$(getconf _NPROCESSORS_ONLN)"
    memory="$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)"
    RUN="$(mktemp -d /run/nnunet-conres-slurm.XXXXXX)"
    mkdir -p "$cluster"/{state,spool}
    chmod 755 "$RUN"
    dd if=/dev/urandom of="$RUN/munge.key" bs=1024 count=1 status=none
    chmod 400 "$RUN/munge.key"
    cat >"$cluster/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd.log
# no control groups, which a container may not have
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
# ended jobs stay in the table
MinJobAge=86400
KillWait=10
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=24:00:00 State=UP
CONF
    # Jobs do not inherit SLURM_CONF, so SLURM has to find the file in its default location.
    [ ! -e /etc/slurm/slurm.conf ] || fail "/etc/slurm/slurm.conf exists: this machine is part of a cluster already."
    mkdir -p /etc/slurm
    ln -s "$cluster/slurm.conf" /etc/slurm/slurm.conf
    LINKED=yes
    # --force turns the error about a parent folder that others can write to into a warning
    munged --force --foreground --key-file="$RUN/munge.key" --socket="$RUN/munge.socket" --pid-file="$RUN/munged.pid" \
        --seed-file="$RUN/munge.seed" --log-file="$RUN/munged.log" --num-threads=2 >"$cluster/munged.out" 2>&1 &
    STARTED+=("$!")
    wait_for 30 test -S "$RUN/munge.socket" || fail "munged did not start; see $cluster/munged.out"
    slurmctld -D >"$cluster/slurmctld.out" 2>&1 &
    STARTED+=("$!")
    slurmd -D -N "$host" >"$cluster/slurmd.out" 2>&1 &
    STARTED+=("$!")
    # This cluster has no accounting. If scontrol takes 10 s to answer once, as on a busy machine, the plugin asks sacct
    # for job states instead, and loses all jobs if that fails. This stand-in answers from squeue.
    mkdir -p "$WORK/bin"
    cat >"$WORK/bin/sacct" <<'STAND_IN'
#!/bin/sh
for last; do :; done
exec squeue --noheader --states=all --format='%i|%T' --name="$last"
STAND_IN
    chmod +x "$WORK/bin/sacct"
    wait_for 60 node_is_idle || fail "SLURM did not start; see $cluster"
    sinfo
}

node_is_idle() {
    sinfo --noheader --format=%t 2>/dev/null | grep -q '^idle$'
}

# wait_for SECONDS COMMAND...
wait_for() {
    local until=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$until" ] || return 1
        sleep 1
    done
}

make_experiment() {
    heading "Synthetic cases and a configuration"
    mkdir -p "$WORK/trainers"
    nnunet-conres phantom -o "$WORK/phantoms" -n 6 --held-out 2 --shape 24 24 20 --spacing 7 7 7
    # An epoch is long enough to be killed in the middle.
    cat >"$WORK/trainers/short_trainers.py" <<PYTHON_CODE
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.trainers import nnUNetTrainerConResNet


class ShortNNUNet(nnUNetTrainer):
    def initialize(self):
        super().initialize()
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, ${ITERATIONS:-10}, 2


class ShortConResNet(nnUNetTrainerConResNet):
    training_epochs = 1

    def initialize(self):
        super().initialize()
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = ${ITERATIONS:-40}, 2
PYTHON_CODE
    cat >"$WORK/experiment.yaml" <<YAML
work: experiment
folders: {nnUNet_raw: nn/raw, nnUNet_preprocessed: nn/preprocessed, nnUNet_results: nn/results}
data: {id: 503, name: Phantoms, brats: [phantoms/training], held_out: [phantoms/held_out]}
models:
  nnU-Net: {trainer: ShortNNUNet}
  ConResNet: {trainer: ShortConResNet, plans: nnUNetConResNetPlans}
folds: [0, 1]
splits: {folds: 2}
device: cpu
retries: 2
checkpoint_minutes: 0.05
time_limit_hours: 2
environment:
  nnUNet_n_proc_DA: 1
  nnUNet_def_n_proc: 1
  nnUNet_extTrainer: $WORK/trainers
  OMP_NUM_THREADS: 1
resources:
  default: {cpus: 1, memory_gb: 3, minutes: 60, partition: main}
YAML
}

workflow() {
    PATH="$WORK/bin:$PATH" nnunet-conres workflow "$WORK/experiment.yaml" --profile slurm --slurm-no-account --slurm-status-command squeue \
        --slurm-init-seconds-before-status-checks 5 --seconds-between-status-checks 5 --latency-wait 30 --jobs 20 "$@"
}

# Cancels the first training of ConResNet that is in the middle of its epoch and has a checkpoint.
kill_a_training() {
    local until=$((SECONDS + 1500)) lock fold job
    while [ "$SECONDS" -lt "$until" ]; do
        for lock in "$WORK"/nn/results/*/ShortConResNet__*/workflow/fold_*.lock; do
            fold="$(basename "$lock" .lock)"
            if [ -s "$lock" ] && [ -e "$(dirname "$lock")/../$fold/checkpoint_latest.pth" ]; then
                job="$(sed -n 's/.*"job": "\([0-9]*\)".*/\1/p' "$lock")"
                # let some iterations pass
                sleep 2
                if [ -n "$job" ] && [ -s "$lock" ] && scancel "$job"; then
                    {
                        printf '%s job %s %s\n' "$(date '+%F %T')" "$job" "$fold"
                        tail -n 2 "$(dirname "$lock")/../$fold"/training_log_*.txt
                    } >"$WORK/killed.txt"
                    # the status after the job has ended, before Snakemake notices
                    wait_for 30 flock --nonblock "$lock" true || true
                    nnunet-conres workflow "$WORK/experiment.yaml" --status >"$WORK/status_after_kill.txt" || true
                    return 0
                fi
            fi
        done
        sleep 0.3
    done
    return 1
}

job_table() {
    heading "Jobs"
    squeue --states=all --sort=i --format='%.6i %.42k %.10T %.19S %.19e %.8M %.4C' | tee "$WORK/jobs.txt"
}

check_recovery() {
    heading "Killed and recovered"
    local job fold log
    read -r _ _ _ job fold <"$WORK/killed.txt"
    cat "$WORK/killed.txt" "$WORK/status_after_kill.txt"
    log="$WORK/experiment/logs/train/ConResNet/$fold.log"
    [ "$(squeue --noheader --states=all --jobs="$job" --format=%T)" = CANCELLED ] || fail "job $job was not cancelled."
    grep --no-filename -h 'Continuing this epoch after iteration' "$log" ||
        fail "$fold did not resume from its checkpoint; see $log"
    grep '^\[workflow\].* nnUNetv2_train .*--c$' "$log" || fail "$fold was not restarted with --c; see $log"
    [ "$(grep -c '^Epoch 0\|: Epoch 0 *$' "$log")" -eq 2 ] || fail "epoch 0 should have been entered twice; see $log"
}

check_all_is_done() {
    heading "Status"
    nnunet-conres workflow "$WORK/experiment.yaml" --status | tee "$WORK/status.txt"
    [ "$(grep -c ' done ' "$WORK/status.txt")" -eq 4 ] || fail "not all four trainings are done."
    local report
    for report in folds test; do
        [ -s "$WORK/experiment/report/$report/report.html" ] || fail "there is no report on $report."
    done
    heading "A second run"
    workflow >"$WORK/second.log" 2>&1 || fail "the second run failed; see $WORK/second.log"
    grep 'Nothing to be done' "$WORK/second.log" || fail "the second run did something; see $WORK/second.log"
}

# Runs the commands from the logs, except for the second attempt of the killed training, in other folders.
run_sequentially() {
    heading "The same commands one after another"
    local command began number=0 all sequential_seconds sequential="$WORK/sequential"
    mkdir -p "$sequential/experiment/predictions" "$sequential"/nn/{raw,preprocessed,results}
    grep --no-filename --recursive '^\[workflow\] [0-9-]* [0-9:]* on .*: ' "$WORK/experiment/logs" --include='*.log' |
        grep -v -- '--c$' | sort -k 2,3 | sed 's/^[^:]*:[^:]*:[^:]*: //' |
        sed "s#$WORK/experiment/#$sequential/experiment/#g; s#$WORK/nn/#$sequential/nn/#g; s#/predictions/\.\([^ ]*\)_part_[0-9]*#/predictions/\1#; s#/predictions/\.#/predictions/#" \
            >"$sequential/commands.sh"
    all="$(wc -l <"$sequential/commands.sh")"
    began=$SECONDS
    while read -r command; do
        number=$((number + 1))
        printf '%s/%s %s s: %s\n' "$number" "$all" "$((SECONDS - began))" "$(cut -d ' ' -f 1-4 <<<"$command")"
        nnUNet_raw="$sequential/nn/raw" nnUNet_preprocessed="$sequential/nn/preprocessed" \
            nnUNet_results="$sequential/nn/results" nnUNet_extTrainer="$WORK/trainers" nnUNet_n_proc_DA=1 \
            nnUNet_def_n_proc=1 OMP_NUM_THREADS=1 nnUNet_conres_checkpoint_minutes=0.05 \
            bash -c "$command" >>"$sequential/output.log" 2>&1 </dev/null ||
            fail "failed in sequence: $command" "See $sequential/output.log"
    done <"$sequential/commands.sh"
    sequential_seconds=$((SECONDS - began))
    heading "Wall time"
    {
        printf '%-72s %6s s\n' "through SLURM, $(squeue --noheader --states=all | wc -l) jobs, one of them killed and run again" "$1"
        printf '%-72s %6s s\n' "one after another, the same $all commands, without workflow and SLURM" "$sequential_seconds"
        printf '%-72s %6s\n' "through SLURM, as a share of one after another" \
            "$(awk "BEGIN {printf \"%.2f\", $1 / $sequential_seconds}")"
        printf '%-72s %6s\n' "processes that wanted a core before (load), of $(getconf _NPROCESSORS_ONLN) cores" "$2"
    } | tee "$WORK/times.txt"
}

clean_up() {
    local status=$? pid
    set +e
    # first Snakemake, a child of the shell that runs the function; it cancels its jobs
    if [ -n "${RUNNING:-}" ]; then
        pkill -P "$RUNNING"
        wait "$RUNNING"
    fi
    # then the remaining jobs, which slurmd's processes hold
    if [ "${#STARTED[@]}" -gt 1 ]; then
        scancel --user=root >/dev/null 2>&1
        sleep 2
    fi
    for ((number = ${#STARTED[@]} - 1; number >= 0; number--)); do
        pid="${STARTED[number]}"
        kill "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
    done
    [ -z "$LINKED" ] || rm -f /etc/slurm/slurm.conf
    [ -z "${RUN:-}" ] || rm -rf "$RUN"
    exit "$status"
}

main "$@"
