"""Training for cases that lack modalities."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.augmentation.channel_dropout import ChannelDropoutTransform
from nnunet_conres.errors import InputError
from nnunet_conres.trainers.base import PluginTrainer

# What it makes of an image that is 0 everywhere is another number.
_NOT_ZERO = "CTNormalization"


class ChannelDropoutMixin(PluginTrainer):
    """Leaves out each channel of a patch with a probability, and never all.

    Attributes:
        p_channel_dropout: The probability. Of four channels, all are there in 41 of 100 patches.
    """

    p_channel_dropout = 0.2

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        channels = [str(n) for n, scheme in enumerate(configuration.normalization_schemes) if scheme == _NOT_ZERO]
        if channels:
            raise InputError(
                f"{cls.__name__} sets channels to 0, as absent modalities are; {_NOT_ZERO} of channel "
                f"{', '.join(channels)} in configuration {name} makes another number of these. Choose another trainer."
            )
        return super().resolve(configuration, name)

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """The pipeline with channel dropout. Takes the arguments of nnU-Net's method of this name."""
        transforms = super().get_training_transforms(*args, **kwargs).transforms
        # The first after the grey values; what a cascade adds follows.
        position = next(number for number, one in enumerate(transforms) if isinstance(one, RemoveLabelTransform))
        dropout = ChannelDropoutTransform(cls.p_channel_dropout)
        return ComposeTransforms([*transforms[:position], dropout, *transforms[position:]])
