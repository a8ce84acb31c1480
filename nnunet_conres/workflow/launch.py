"""Starts Snakemake on an experiment."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nnunet_conres.workflow.config import Experiment
from nnunet_conres.workflow.locks import LockedError, hold
from nnunet_conres.workflow.step import gpus_here

FOLDER: Final = Path(__file__).resolve().parent
SNAKEFILE: Final = FOLDER / "Snakefile"
EXAMPLES: Final = {path.stem: path for path in sorted((FOLDER / "examples").glob("*.yaml"))}
PROFILES: Final = tuple(sorted(path.parent.name for path in FOLDER.glob("profiles/*/config.yaml")))
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
        dry_run: Only tell what would be done.

    Raises:
        FileNotFoundError: There is no such profile.
    """
    folder = FOLDER / "profiles" / profile
    if profile not in PROFILES:
        folder = Path(profile).expanduser().absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"--profile {profile}: expected {' or '.join(PROFILES)}, or a profile's folder.")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--configfile", str(config.resolve())]
    if profile == "local":
        at_hand = [f"mem_mb={_memory_mb()}"]
        if experiment.device == "cuda":
            at_hand.append(f"gpu={max(1, len(gpus_here()))}")
        command += ["--resources", *at_hand]
    # Our own lock is given back when this process ends, however it ends; Snakemake's would have to be removed by hand.
    command += ["--directory", str(experiment.work), "--nolock", "--profile", str(folder)]
    if profile == "slurm":
        command += ["--slurm-logdir", str(experiment.logs / "slurm")]
        command += ["--slurm-jobname-prefix", "".join(filter(str.isalnum, experiment.work.name)) or "experiment"]
    if dry_run:
        command.append("--dry-run")
    return [*command, *options]


def _memory_mb() -> int:
    """Memory that jobs on this machine may take together, some left for the rest."""
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 10**6)


def launch(experiment: Experiment, config: Path, profile: str, options: Sequence[str], *, dry_run: bool = False) -> int:
    """Runs an experiment to its end.

    Returns:
        Snakemake's exit code.

    Raises:
        RuntimeError: Snakemake is not installed, or the experiment is being run already.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise RuntimeError("Snakemake is not installed. Run: pip install 'nnunet-conres[workflow]'")
    command = snakemake_command(experiment, config, profile, options, dry_run=dry_run)
    if dry_run or _ONLY_TELL.intersection(options):
        return subprocess.run(command, check=False).returncode
    try:
        with hold(experiment.work / "workflow.lock", wait=False):
            return subprocess.run(command, check=False).returncode
    except LockedError as error:
        raise RuntimeError(f"This experiment is being run already: {error}") from error
