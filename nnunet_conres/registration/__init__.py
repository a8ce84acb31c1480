"""How nnU-Net finds the trainers of this package. Nothing in here imports torch.

nnU-Net (2.8 and later) looks up a trainer that is not its own in the folders that the environment variable
``nnUNet_extTrainer`` names, and imports every module found there. ``external_trainers/`` beside this file is such a
folder, with one module in it. A start-up file at the top of site-packages (``nnunet_conres.pth``, kept beside this
file) adds it to the variable whenever Python starts in an environment that the package is installed in: last, so that
a user's own trainers win, and once, also in child processes.

A new trainer is made known to nnU-Net by a line in `TRAINERS`.
"""

import os

VARIABLE = "nnUNet_extTrainer"
"""The environment variable in which nnU-Net takes folders with trainers, separated by ``os.pathsep``."""

TRAINER_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "external_trainers")
"""The folder of this package that nnU-Net searches."""

MINIMUM_NNUNET = (2, 8)
"""The oldest nnU-Net whose search of external folders these trainers can rely on."""

TRAINERS: dict[str, str] = {
    "nnUNetTrainerConResNet": "ConResNet under nnU-Net's own recipe",
    "nnUNetTrainerConResNetPaper": "ConResNet in the paper's topology, loss, optimiser, schedule and augmentation",
    "nnUNetTrainerConResNetSharedEncoder": "ConResNet with one encoder over the image and the image residual",
    "nnUNetTrainerConResNet_NoMirroring": "nnUNetTrainerConResNet without mirroring, in training and in prediction",
    "nnUNetTrainerConResNet_1epoch": "nnUNetTrainerConResNet for 1 epoch, to try the pipeline",
    "nnUNetTrainerConResNet_5epochs": "nnUNetTrainerConResNet for 5 epochs",
    "nnUNetTrainerConResNet_10epochs": "nnUNetTrainerConResNet for 10 epochs",
    "nnUNetTrainerConResNet_20epochs": "nnUNetTrainerConResNet for 20 epochs",
    "nnUNetTrainerConResNet_50epochs": "nnUNetTrainerConResNet for 50 epochs",
    "nnUNetTrainerConResNet_100epochs": "nnUNetTrainerConResNet for 100 epochs",
    "nnUNetTrainerConResNet_250epochs": "nnUNetTrainerConResNet for 250 epochs",
    "nnUNetTrainerConResNet_500epochs": "nnUNetTrainerConResNet for 500 epochs",
    "nnUNetTrainerConResNet_2000epochs": "nnUNetTrainerConResNet for 2000 epochs",
}
"""What ``-tr`` can be, with a line on each: all that `nnunet_conres.trainers` exports."""


def folders() -> list[str]:
    """All folders that nnU-Net would search for trainers now, in its order, as they are spelled in the variable."""
    return [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def is_own_folder(folder: str) -> bool:
    """Whether a folder is this package's, however it is spelled."""
    return os.path.normcase(os.path.normpath(folder)) == os.path.normcase(TRAINER_FOLDER)


def is_active() -> bool:
    """Whether nnU-Net, started in this process or in a child of it, would find the trainers of this package."""
    return any(is_own_folder(folder) for folder in folders())
