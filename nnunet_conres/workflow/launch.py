"""Start Snakemake on an experiment."""

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
# Lock in the experiment's folder, held by the process that runs the experiment.
_LOCK: Final = "workflow.lock"
# Snakemake's options that run nothing; they are allowed while the experiment is running.
_ONLY_TELL: Final = frozenset({"--dag", "--rulegraph", "--filegraph", "--summary", "--list-rules", "-n"})


def snakemake_command(
    experiment: Experiment, config: Path, profile: str, options: Sequence[str], *, dry_run: bool = False
) -> list[str]:
    """Return the command that runs an experiment.

    Args:
        experiment: The experiment.
        config: Its configuration file.
        profile: ``local``, ``slurm``, or the folder of the user's own profile.
        options: Options of Snakemake; they override those of the profile.
        dry_run: Whether to only show what would be done.

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
            # Snakemake would reduce a job's GPUs to the number given here, in a dry run too
            at_hand.append(f"gpu={max(_most_gpus(experiment), len(_gpus_of(experiment)))}")
        command += ["--resources", *at_hand]
    # Our own lock is released however this process ends; Snakemake's might have to be removed by hand.
    command += ["--directory", str(experiment.work), "--nolock", "--profile", str(folder)]
    if profile == "slurm":
        command += ["--slurm-logdir", str(experiment.logs / "slurm")]
        command += ["--slurm-jobname-prefix", job_name(experiment)]
    if dry_run:
        command.append("--dry-run")
    return [*command, *options]


def job_name(experiment: Experiment) -> str:
    """Return the prefix of an experiment's SLURM job names, in the characters and the length that the plugin allows."""
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
    """Return the GPUs that an experiment's steps will see. Its variables override those of this process."""
    from nnunet_conres.workflow.step import gpus_here

    return gpus_here({**os.environ, **experiment.environment})


def _memory_mb() -> int:
    """Return the memory in MB for all jobs on this machine together; the rest is left for other processes."""
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 10**6)


def launch(experiment: Experiment, config: Path, profile: str, options: Sequence[str], *, dry_run: bool = False) -> int:
    """Run an experiment to its end.

    Returns:
        Snakemake's exit code.

    Raises:
        InputError: Snakemake is not installed, the experiment is already running, or GPUs are missing.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise InputError("Snakemake is not installed. Run: pip install 'nnunet-conres[workflow]'")
    command = snakemake_command(experiment, config, profile, options, dry_run=dry_run)
    if dry_run or _ONLY_TELL.intersection(options):
        if experiment.work.exists():
            return subprocess.run(command, check=False).returncode
        # Snakemake creates its folder anyway; the lock keeps out a run that starts meanwhile
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
            f"This experiment is already running: {error} If that process has ended, its Snakemake still runs."
        ) from error


def _run_to_its_end(command: Sequence[str], descriptor: int) -> int:
    """Run Snakemake, which holds the lock too: it continues if only this process is killed.

    A signal that is to end this process is passed to Snakemake as an interrupt. Snakemake then cancels its jobs, which
    may take a minute, and this process waits for it. Snakemake runs in a separate session: the terminal would otherwise
    interrupt it a second time.
    """
    started: list[subprocess.Popen[bytes]] = []
    too_early: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        message = "Interrupted. Snakemake is stopping its jobs. Run the same command again to continue."
        print(message, file=sys.stderr, flush=True)
        if started:
            hand_on()
        else:
            too_early.append(number)

    def hand_on() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started[0].pid, signal.SIGINT)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
        numbers.append(signal.SIGHUP)
    # before Snakemake starts: in a script's background job it would otherwise inherit that interrupts are ignored
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        started.append(subprocess.Popen(command, pass_fds=[descriptor], start_new_session=True))
        if too_early:  # a signal arrived before there was a process to pass it to
            hand_on()
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
