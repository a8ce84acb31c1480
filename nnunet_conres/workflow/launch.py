"""Starts Snakemake on an experiment."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nnunet_conres.errors import InputError
from nnunet_conres.folders import writing
from nnunet_conres.locks import LockedError, hold

if TYPE_CHECKING:
    from nnunet_conres.workflow.config import Experiment

FOLDER: Final = Path(__file__).resolve().parent
SNAKEFILE: Final = FOLDER / "Snakefile"
EXAMPLES: Final = {path.stem: path for path in sorted((FOLDER / "examples").glob("*.yaml"))}
PROFILES: Final = tuple(sorted(path.parent.name for path in FOLDER.glob("profiles/*/config.yaml")))
# In the experiment's folder, held by the one process that runs it.
_LOCK: Final = "workflow.lock"
# Options of Snakemake with which it runs nothing, so that they may be used beside a running experiment.
_ONLY_TELL: Final = frozenset({"--dag", "--rulegraph", "--filegraph", "--summary", "--list-rules", "-n"})


def snakemake_command(
    experiment: Experiment, config: Path, profile: str, options: Sequence[str], *, dry_run: bool = False
) -> list[str]:
    """The command that runs an experiment.

    Args:
        experiment: The experiment.
        config: Its configuration.
        profile: ``local``, ``slurm``, or the folder of a profile of the user's own.
        options: Snakemake's own options; they win over the profile's.
        dry_run: Only show what would be done.

    Raises:
        InputError: There is no such profile.
    """
    folder = FOLDER / "profiles" / profile
    if profile not in PROFILES:
        folder = Path(profile).expanduser().absolute()
        if not folder.is_dir():
            raise InputError(f"--profile {profile}: expected {' or '.join(PROFILES)}, or a profile's folder.")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--configfile", str(config.resolve())]
    if profile == "local":
        at_hand = [f"mem_mb={_memory_mb()}"]
        if experiment.device == "cuda":
            # Snakemake would take away from jobs what there is not, in a dry run too
            at_hand.append(f"gpu={max(_most_gpus(experiment), len(_gpus_of(experiment)))}")
        command += ["--resources", *at_hand]
    # Our own lock is given back when this process ends, however it ends; Snakemake's would have to be removed by hand.
    command += ["--directory", str(experiment.work), "--nolock", "--profile", str(folder)]
    if profile == "slurm":
        command += ["--slurm-logdir", str(experiment.logs / "slurm")]
        command += ["--slurm-jobname-prefix", job_name(experiment)]
    if dry_run:
        command.append("--dry-run")
    return [*command, *options]


def job_name(experiment: Experiment) -> str:
    """What the names of an experiment's SLURM jobs begin with; the plugin takes no other letters and no more."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", experiment.work.name)[:50].strip("_-") or "experiment"


def _most_gpus(experiment: Experiment) -> int:
    return max(model.gpus for model in experiment.models)


def _check_gpus(experiment: Experiment) -> None:
    here, needed = len(_gpus_of(experiment)), _most_gpus(experiment)
    if here < needed:
        raise InputError(
            f"device is cuda, and a training needs {needed} GPU{'s' if needed > 1 else ''}, but nvidia-smi and "
            f"CUDA_VISIBLE_DEVICES list {here}. Set that variable if there are more, or device: cpu, or "
            f"use --profile slurm."
        )


def _gpus_of(experiment: Experiment) -> list[str]:
    """GPUs that the steps of an experiment will see, whose variables come before those of this process."""
    from nnunet_conres.workflow.step import gpus_here

    return gpus_here({**os.environ, **experiment.environment})


def _memory_mb() -> int:
    """Memory that jobs on this machine may take together, some left for the rest."""
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 10**6)


def launch(experiment: Experiment, config: Path, profile: str, options: Sequence[str], *, dry_run: bool = False) -> int:
    """Runs an experiment to its end.

    Returns:
        Snakemake's exit code.

    Raises:
        InputError: Snakemake is not installed, the experiment is being run already, or GPUs are missing.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise InputError("Snakemake is not installed. Run: pip install 'nnunet-conres[workflow]'")
    command = snakemake_command(experiment, config, profile, options, dry_run=dry_run)
    if dry_run or _ONLY_TELL.intersection(options):
        if experiment.work.exists():
            return subprocess.run(command, check=False).returncode
        # Snakemake makes its folder all the same; the lock keeps out a run that begins meanwhile
        with writing(experiment.work, lock=_LOCK):
            try:
                return subprocess.run(command, check=False).returncode
            finally:
                for path in set(experiment.work.iterdir()) - {experiment.work / _LOCK}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if profile == "local" and experiment.device == "cuda":
        _check_gpus(experiment)
    try:
        with hold(experiment.work / _LOCK, wait=False) as descriptor:
            return _run_to_its_end(command, descriptor)
    except LockedError as error:
        raise InputError(
            f"This experiment is being run already: {error} If that process is gone, its Snakemake is not."
        ) from error


def _run_to_its_end(command: Sequence[str], descriptor: int) -> int:
    """Runs Snakemake, which holds the lock too: should this process be killed alone, Snakemake goes on.

    What is to end this process is handed to Snakemake as an interruption, upon which it cancels its jobs; that may take
    a minute, and is waited for. Snakemake is kept from the terminal, which would interrupt it a second time.
    """
    started: list[subprocess.Popen[bytes]] = []
    too_early: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        print("Interrupted. Snakemake ends its jobs; the same command goes on later.", file=sys.stderr, flush=True)
        if started:
            hand_on()
        else:
            too_early.append(number)

    def hand_on() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started[0].pid, signal.SIGINT)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    # before Snakemake is there, which would inherit that a background job of a script ignores interruptions
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        started.append(subprocess.Popen(command, pass_fds=[descriptor], start_new_session=True))
        if too_early:  # while Snakemake was starting, before there was a process to signal
            hand_on()
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
