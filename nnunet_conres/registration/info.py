"""What `nnunet-conres info` tells: versions, discovery, path variables, trainers. Answers without importing torch."""

import os
import platform
import sys
import textwrap
from dataclasses import asdict, dataclass, field

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
            as where the variable was set by hand.
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
        problems: What stands in the way, each with what to do about it.
        versions: Of this package, nnU-Net, torch and Python; None for what is not installed.
        nnunet_recent_enough: Whether nnU-Net is installed, and not too old for this package.
        discovery: Whether and how nnU-Net finds the trainers.
        paths: nnU-Net's path variables; None for one that is not set.
        trainers: What ``-tr`` can be, with a line on each.
    """

    ok: bool
    problems: list[str]
    versions: dict[str, str | None]
    nnunet_recent_enough: bool
    discovery: Discovery
    paths: dict[str, str | None]
    trainers: dict[str, str] = field(default_factory=lambda: dict(TRAINERS))

    def as_json(self) -> dict[str, object]:
        """As what `json.dumps` takes."""
        return asdict(self)

    def as_text(self, *, every_length: bool = False, width: int | None = None) -> str:
        """As lines for a person to read.

        Args:
            every_length: Whether to list a trainer once for every number of epochs.
            width: Of the terminal, in characters; None for lines of any length.
        """
        lines = ["Versions"]
        lines += [f"  {name:<19} {version or 'not installed'}" for name, version in self.versions.items()]
        lines += ["", f"Discovery by nnU-Net: {'active' if self.discovery.active else 'NOT ACTIVE'}"]
        read = self.discovery.startup_file or "none was read"
        if self.discovery.active and self.discovery.startup_file is None:
            read += "; the variable was set by hand, or by an older installation"
        lines += [f"  start-up file       {read}"]
        lines += [f"  trainers in         {self.discovery.folder}"]
        for folder in self.discovery.other_folders:
            lines += [f"  also searched       {folder.path}{'' if folder.exists else ' (does not exist)'}"]
        lines += ["", "nnU-Net's folders"]
        lines += [f"  {name:<19} {path or 'not set'}" for name, path in self.paths.items()]
        lines += ["", "Trainers (nnUNetv2_train ... -tr NAME)", *self._lines_of_trainers(every_length, width)]
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
            lengths = ", ".join(f"_{ending}" for ending in TRAINING_LENGTHS)
            note = f"Also for another number of epochs: NAME{lengths}. --all lists every name."
            lines += ["", *_wrapped("* ", note, width)]
        return lines


def collect() -> Info:
    """Looks at the environment of this process.

    Returns:
        What was found. Nothing is raised for a faulty installation: telling what is wrong with it is the purpose.
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
        paths={name: os.environ.get(name) for name in FOLDER_VARIABLES},
    )


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
    """A text as lines, indented as far as the beginning of the first."""
    if width is None:
        return [begin + text]
    return textwrap.wrap(
        text,
        max(width, len(begin) + 30),
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
        break_on_hyphens=False,
    )
