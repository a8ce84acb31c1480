"""How nnU-Net finds the trainers of this package. Nothing in here imports torch.

nnU-Net (2.8 and later) looks up a trainer that is not its own in the folders that the environment variable
``nnUNet_extTrainer`` names, and imports every module found there. ``external_trainers/`` beside this file is such a
folder, with one module in it. A start-up file at the top of site-packages adds it to the variable whenever Python
starts in an environment that the package is installed in: last, so that a user's own trainers win, and once, also in
child processes. Python up to 3.14 reads ``nnunet_conres.pth``, later versions read ``nnunet_conres.start``; both call
the same function. ``site_packages/`` beside this file contains both files and the module with the function.

`nnunet_conres.families` lists the trainers.
"""

import os

VARIABLE = "nnUNet_extTrainer"
"""The environment variable with nnU-Net's external trainer folders, separated by ``os.pathsep``."""

TRAINER_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "external_trainers")
"""The folder of this package that nnU-Net searches."""

MINIMUM_NNUNET = (2, 8)
"""The oldest nnU-Net whose search of external folders these trainers can rely on."""


def folders() -> list[str]:
    """Return all folders that nnU-Net would search for trainers now, in its order, as spelled in the variable."""
    return [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def is_own_folder(folder: str) -> bool:
    """Return whether a folder is this package's trainer folder, however it is spelled."""
    return os.path.normcase(os.path.normpath(folder)) == os.path.normcase(TRAINER_FOLDER)


def is_active() -> bool:
    """Return whether nnU-Net, started in this process or a child process, would find this package's trainers."""
    return any(is_own_folder(folder) for folder in folders())
