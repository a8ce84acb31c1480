"""The registry of network families. Imports nothing heavy.

Everything that needs a list of networks is derived from `FAMILIES`: the planners, the choices of ``-a``, the trainers
that nnU-Net finds and their training lengths, the names that a workflow accepts, and the networks in the shared tests.
To add a family, add an entry here and a module named after its key in ``architectures``, ``plans`` and ``trainers``
(docs/how-to/family.md).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from nnunet_conres.errors import InputError
from nnunet_conres.nnunet import stock_trainers
from nnunet_conres.text import did_you_mean

TRAINING_LENGTHS: Final[Mapping[str, int]] = {
    f"{epochs}epoch{'s' if epochs > 1 else ''}": epochs for epochs in (1, 5, 10, 20, 50, 100, 250, 500, 2000)
}
"""Suffixes of trainer names for other numbers of epochs."""


@dataclass(frozen=True)
class Family:
    """A network with its trainers and planner.

    Attributes:
        key: Name of the family for ``plan -a``. Its trainers are in ``nnunet_conres.trainers.KEY``. In
            ``nnunet_conres.plans.KEY``, ``architecture`` builds its entry of plans, and ``paper_architecture`` that of
            the paper's form.
        title: Name of the network in messages.
        trainers: Names of its trainers, each with a short description; both fit on a line of 80 characters. The first
            trainer is the one for the plans of its planner.
        networks: Import paths of its classes, the one in the planner's plans first; empty for the network that the
            plans name.
        name: Part of the names of its plans and its planner; "" if it has no planner.
    """

    key: str
    title: str
    trainers: Mapping[str, str]
    networks: tuple[str, ...]
    name: str

    @property
    def plans_name(self) -> str:
        """Default name of its plans."""
        return f"nnUNet{self.name}Plans"

    @property
    def planner_name(self) -> str:
        """Name of its planner in the plans."""
        return f"{self.name}Planner"

    @property
    def trainer_name(self) -> str:
        """The trainer for its plans."""
        return next(iter(self.trainers))

    @property
    def with_lengths(self) -> list[str]:
        """The trainers that exist in every training length: the first one, and its variant with nnU-Net's recipe."""
        return [name for name in self.trainers if name in (self.trainer_name, f"{self.trainer_name}_SGD")]

    @property
    def plans(self) -> Any:
        """The module that builds its entry of plans."""
        return import_module(f"nnunet_conres.plans.{self.key}")


FAMILIES: Final = (
    Family(
        key="conresnet",
        title="ConResNet",
        networks=(
            "nnunet_conres.architectures.conresnet.ConResNet",
            "nnunet_conres.architectures.conresnet_paper.ConResNetPaper",
        ),
        trainers={
            "nnUNetTrainerConResNet": "ConResNet, nnU-Net's recipe with Muon",
            "nnUNetTrainerConResNet_SGD": "ConResNet, nnU-Net's own recipe",
            "nnUNetTrainerConResNetPaper": "ConResNet, trained as in the paper",
            "nnUNetTrainerConResNetSharedEncoder": "one encoder for image and residual",
            "nnUNetTrainerConResNetBSpline": "ConResNet, B-spline augmentation",
            "nnUNetTrainerConResNet_NoMirroring": "ConResNet without mirroring",
            "nnUNetTrainerConResNet_ChannelDropout": "for cases that lack modalities",
        },
        name="ConResNet",
    ),
    Family(
        key="residual_maps",
        title="ResidualMapUNet",
        networks=("nnunet_conres.architectures.residual_map_unet.ResidualMapUNet",),
        trainers={
            "nnUNetTrainerResidualMaps": "ResEnc U-Net with residual maps, Muon",
            "nnUNetTrainerResidualMaps_SGD": "the same, nnU-Net's own recipe",
        },
        name="ResidualMaps",
    ),
    Family(
        key="stock",
        title="the network that the plans name",
        networks=(),
        trainers={
            "nnUNetTrainerMuon": "nnU-Net's 3D network with Muon",
            "nnUNetTrainerMuon_ChannelDropout": "for cases that lack modalities",
        },
        name="",
    ),
    Family(
        key="vnet",
        title="V-Net",
        networks=("nnunet_conres.architectures.vnet.VNet",),
        trainers={
            "nnUNetTrainerVNet": "V-Net, nnU-Net's own recipe",
            "nnUNetTrainerVNetPaper": "V-Net, trained as in the paper",
        },
        name="VNet",
    ),
    Family(
        key="unet3d",
        title="3D U-Net",
        networks=("nnunet_conres.architectures.unet3d.UNet3D",),
        trainers={
            "nnUNetTrainerUNet3D": "3D U-Net, nnU-Net's own recipe",
            "nnUNetTrainerUNet3DPaper": "3D U-Net, trained as in the paper",
        },
        name="UNet3D",
    ),
)

PLANNED: Final = {family.key: family for family in FAMILIES if family.name}
"""Families that have a planner, by their key, the choices of ``-a``."""

LENGTHS: Final = {
    f"{trainer}_{ending}": (trainer, epochs)
    for family in FAMILIES
    for trainer in family.with_lengths
    for ending, epochs in TRAINING_LENGTHS.items()
}
"""Trainers that differ from a base trainer only in the number of epochs: name of the base trainer, and the number."""

TRAINERS: Final[Mapping[str, str]] = {
    trainer: description for family in FAMILIES for trainer, description in family.trainers.items()
} | {
    name: f"{trainer} for {epochs} epoch" + ("s" if epochs > 1 else ", to try the pipeline")
    for name, (trainer, epochs) in LENGTHS.items()
}
"""Trainer names for ``-tr``, each with a one-line description."""


def no_trainer(name: str) -> str:
    """Return the message for a trainer that neither nnU-Net nor this package has."""
    near = did_you_mean(name, [*TRAINERS, *stock_trainers()])
    return f"There is no trainer {name}{near} nnunet-conres info lists the trainers of this package."


def load(path: str) -> Any:
    """Import a class or function of this package.

    Args:
        path: Import path, such as "nnunet_conres.architectures.vnet.VNet".
    """
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def load_trainer(name: str) -> Any:
    """Return the class of a trainer.

    Args:
        name: One of `TRAINERS`.
    """
    if name in LENGTHS:
        return load(f"nnunet_conres.trainers.lengths.{name}")
    key = next(family.key for family in FAMILIES if name in family.trainers)
    return load(f"nnunet_conres.trainers.{key}.{name}")


def find_trainer(name: str) -> Any:
    """Return the trainer class that nnU-Net's commands find under a name.

    Raises:
        InputError: There is no trainer of this name.
    """
    if name in TRAINERS:
        return load_trainer(name)
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints where it searches
            return recursive_find_trainer_class_by_name(name)
    except (RuntimeError, ImportError) as error:
        raise InputError(no_trainer(name)) from error
