"""How nnU-Net finds the trainers of this package. Nothing in here imports torch.

nnU-Net (2.8 and later) looks up a trainer that is not its own in the folders that the environment variable
``nnUNet_extTrainer`` names, and imports every module found there. ``external_trainers/`` beside this file is such a
folder, with one module in it. A start-up file at the top of site-packages adds it to the variable whenever Python
starts in an environment that the package is installed in: last, so that a user's own trainers win, and once, also in
child processes. Python up to 3.14 reads ``nnunet_conres.pth``, later ones ``nnunet_conres.start``; both call one
function, and ``site_packages/`` beside this file holds all three.

A new trainer is made known to nnU-Net by a line in `TRAINERS`.
"""

import os

VARIABLE = "nnUNet_extTrainer"
"""The environment variable in which nnU-Net takes folders with trainers, separated by ``os.pathsep``."""

TRAINER_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "external_trainers")
"""The folder of this package that nnU-Net searches."""

MINIMUM_NNUNET = (2, 8)
"""The oldest nnU-Net whose search of external folders these trainers can rely on."""

TRAINING_LENGTHS: dict[str, int] = {
    "1epoch": 1,
    "5epochs": 5,
    "10epochs": 10,
    "20epochs": 20,
    "50epochs": 50,
    "100epochs": 100,
    "250epochs": 250,
    "500epochs": 500,
    "2000epochs": 2000,
}
"""Endings of the names of trainers with another number of epochs."""

_FAMILIES = (
    "nnUNetTrainerConResNet",
    "nnUNetTrainerConResNet_SGD",
    "nnUNetTrainerResidualMaps",
    "nnUNetTrainerResidualMaps_SGD",
    "nnUNetTrainerMuon",
    "nnUNetTrainerVNet",
    "nnUNetTrainerUNet3D",
)

TRAINERS: dict[str, str] = {
    "nnUNetTrainerConResNet": "ConResNet under nnU-Net's recipe, with Muon as the optimiser",
    "nnUNetTrainerConResNet_SGD": "ConResNet under nnU-Net's own recipe",
    "nnUNetTrainerConResNetPaper": "ConResNet in the paper's topology, loss, optimiser, schedule and augmentation",
    "nnUNetTrainerConResNetSharedEncoder": "ConResNet with one encoder over the image and the image residual",
    "nnUNetTrainerConResNetBSpline": "ConResNet with B-spline deformations in the augmentation",
    "nnUNetTrainerConResNet_NoMirroring": "ConResNet without mirroring, in training and in prediction",
    "nnUNetTrainerResidualMaps": "ResidualMapUNet: nnU-Net's ResEnc U-Net that also predicts residual maps, with Muon",
    "nnUNetTrainerResidualMaps_SGD": "ResidualMapUNet under nnU-Net's own recipe",
    "nnUNetTrainerMuon": "the 3D network of the plans, nnU-Net's own, under nnU-Net's recipe with Muon",
    "nnUNetTrainerVNet": "V-Net under nnU-Net's own recipe",
    "nnUNetTrainerVNetPaper": "V-Net in the paper's topology, loss, optimiser, schedule and augmentation",
    "nnUNetTrainerUNet3D": "3D U-Net under nnU-Net's own recipe",
    "nnUNetTrainerUNet3DPaper": "3D U-Net in the paper's topology, loss, batch norm and augmentation",
} | {
    f"{family}_{ending}": f"{family} for {epochs} epoch" + ("s" if epochs > 1 else ", to try the pipeline")
    for family in _FAMILIES
    for ending, epochs in TRAINING_LENGTHS.items()
}
"""What ``-tr`` can be, with a line on each: all that `nnunet_conres.trainers` exports."""

WITH_NETWORK_OF_THE_PLANS = frozenset(name for name in TRAINERS if name.startswith("nnUNetTrainerMuon"))
"""Those of them that bring no network of their own."""


def folders() -> list[str]:
    """All folders that nnU-Net would search for trainers now, in its order, as they are spelled in the variable."""
    return [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def is_own_folder(folder: str) -> bool:
    """Whether a folder is this package's, however it is spelled."""
    return os.path.normcase(os.path.normpath(folder)) == os.path.normcase(TRAINER_FOLDER)


def is_active() -> bool:
    """Whether nnU-Net, started in this process or in a child of it, would find the trainers of this package."""
    return any(is_own_folder(folder) for folder in folders())
