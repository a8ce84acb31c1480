"""The content of `nnunet-conres info`: versions, GPUs, discovery, path variables, trainers. Does not import torch."""

import contextlib
import os
import platform
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from nnunet_conres import __version__, registration
from nnunet_conres.families import LENGTHS, TRAINERS, TRAINING_LENGTHS
from nnunet_conres.nnunet import FOLDER_VARIABLES
from nnunet_conres.registration.nnunet_version import installed_version, version_problem


@dataclass
class Folder:
    """A folder that nnU-Net searches for trainers."""

    path: str
    exists: bool


@dataclass
class Discovery:
    """Whether nnU-Net finds the trainers of this package, and where else it looks.

    Attributes:
        active: Whether this package's folder is in the variable.
        variable: Name of the variable.
        startup_file: The start-up file that Python has read: nnunet_conres.start or nnunet_conres.pth; None if neither,
            for example because the variable was set by hand.
        folder: This package's folder.
        other_folders: The other folders in the variable, in the order in which nnU-Net searches them.
    """

    active: bool
    variable: str
    startup_file: str | None
    folder: str
    other_folders: list[Folder]


@dataclass
class Info:
    """The state of an installation.

    Attributes:
        ok: Whether nnU-Net can use the trainers: there are no problems.
        problems: One message per problem, with advice.
        versions: Versions of this package, nnU-Net, torch and Python; None if not installed.
        nnunet_recent_enough: Whether nnU-Net is installed, and not too old for this package.
        discovery: Whether and how nnU-Net finds the trainers.
        gpus: Names of the GPUs, and whether torch can use them.
        paths: nnU-Net's path variables; None if not set.
        trainers: Trainer names for ``-tr``, each with a one-line description.
    """

    ok: bool
    problems: list[str]
    versions: dict[str, str | None]
    nnunet_recent_enough: bool
    discovery: Discovery
    gpus: list[str]
    paths: dict[str, str | None]
    trainers: dict[str, str] = field(default_factory=lambda: dict(TRAINERS))

    def as_json(self) -> dict[str, object]:
        """Return the content as a dictionary for `json.dumps`."""
        return asdict(self)

    def as_text(self, *, every_length: bool = False, width: int | None = None) -> str:
        """Return the content as readable text.

        Args:
            every_length: Whether to list a trainer once for every number of epochs.
            width: Width of the terminal in characters; None for lines of any length.
        """
        versions = [f"{name} {version or 'not installed'}" for name, version in self.versions.items()]
        lines = [", ".join(versions)]
        lines += [f"{'GPU':<19} {gpu}" for gpu in self.gpus or ["none"]]
        found = f"active ({self.discovery.startup_file})" if self.discovery.active else "NOT ACTIVE"
        if self.discovery.active and self.discovery.startup_file is None:
            found = "active (no start-up file was read; the variable was set by hand)"
        lines += [f"{'discovery':<19} {found}"]
        for folder in self.discovery.other_folders:
            lines += [f"{'also searched':<19} {folder.path}{'' if folder.exists else ' (does not exist)'}"]
        for name, path in self.paths.items():
            missing = " (does not exist)" if path and not os.path.isdir(path) else ""
            lines += [f"{name:<19} {path or 'not set'}{missing}"]
        lines += [
            "Trainers (nnUNetv2_train ... -tr NAME; --all: for every number of epochs)",
            *self._lines_of_trainers(every_length, width),
        ]
        for problem in self.problems:
            lines += ["", f"PROBLEM: {problem}"]
        return "\n".join(lines)

    def _lines_of_trainers(self, every_length: bool, width: int | None) -> list[str]:
        with_lengths = {trainer for trainer, _ in LENGTHS.values()}
        shown = [name for name in self.trainers if every_length or name not in LENGTHS]
        longest = max(map(len, shown))
        lines = []
        for name in shown:
            mark = "*" if name in with_lengths and not every_length else " "
            lines += _wrapped(f"{mark} {name:<{longest}}  ", self.trainers[name], width)
        if not every_length:
            one, *more = TRAINING_LENGTHS
            numbers = ", ".join(str(TRAINING_LENGTHS[ending]) for ending in more)
            note = f"also NAME_{one} and NAME_Nepochs for N of {numbers}"
            lines += _wrapped("* ", note, width)
        return lines


def collect() -> Info:
    """Collect the state of the installation from the environment of this process.

    Returns:
        The state. A faulty installation raises no exception, but is described in ``problems``.
    """
    versions = {
        "nnunet-conres": __version__,
        "nnunetv2": installed_version("nnunetv2"),
        "torch": installed_version("torch"),
        "python": platform.python_version(),
    }
    nnunet_problem = version_problem()
    problems = [] if nnunet_problem is None else [nnunet_problem]
    if versions["torch"] is None:
        problems.append("PyTorch is not installed. See pytorch.org for the command that suits this machine.")
    active = registration.is_active()
    if not active:
        problems.append(_inactive_hint())
    return Info(
        ok=not problems,
        problems=problems,
        versions=versions,
        nnunet_recent_enough=nnunet_problem is None,
        discovery=Discovery(
            active=active,
            variable=registration.VARIABLE,
            startup_file=getattr(sys.modules.get("_nnunet_conres_startup"), "activated_by", None),
            folder=registration.TRAINER_FOLDER,
            other_folders=[
                Folder(folder, os.path.isdir(folder))
                for folder in registration.folders()
                if not registration.is_own_folder(folder)
            ],
        ),
        gpus=gpus(),
        paths={name: os.environ.get(name) for name in FOLDER_VARIABLES},
    )


def gpus() -> list[str]:
    """Return the names of this machine's GPUs, with their memory, without importing torch.

    If torch is built for the CPU only, each line says that torch can't use the GPU.
    """
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return ["Apple (-device mps)"]
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    unused = "" if _torch_has_cuda() else "; torch is built for the CPU only and can't use it (see pytorch.org)"
    return [line.strip() + unused for line in answer.splitlines() if line.strip()]


def _torch_has_cuda() -> bool:
    """Return whether the installed torch is built for NVIDIA or AMD GPUs, according to its version file."""
    package = find_spec("torch")
    for folder in (package and package.submodule_search_locations) or ():
        with contextlib.suppress(OSError):
            text = Path(folder, "version.py").read_text(encoding="utf-8")
            return re.search(r"^(cuda|hip)\b.*= '", text, re.MULTILINE) is not None
    return False


def _inactive_hint() -> str:
    value = os.pathsep.join([*registration.folders(), registration.TRAINER_FOLDER])
    if os.name == "nt":
        command = f'$env:{registration.VARIABLE} = "{value}"'
    else:
        command = f'export {registration.VARIABLE}="{value}"'
    return (
        "nnU-Net does not find the trainers: Python did not read a start-up file of this package. It does so for a "
        "package installed into an environment (pip install), not for one in a separate folder (pip install "
        f"--target, PYTHONPATH, python -S). Install it into the environment, or set the variable by hand:\n  {command}"
    )


def _wrapped(begin: str, text: str, width: int | None) -> list[str]:
    """Wrap a text; further lines are indented by the length of ``begin``."""
    if width is None:
        return [begin + text]
    return textwrap.wrap(
        text,
        max(width, len(begin) + 30),
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_on_hyphens=False,
    )
