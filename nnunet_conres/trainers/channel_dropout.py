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

# This normalisation maps an image of zeros to another number.
_NOT_ZERO = "CTNormalization"


class ChannelDropoutMixin(PluginTrainer):
    """Trainer that drops each channel of a patch with a probability, but never all.

    Attributes:
        p_channel_dropout: The probability. With four channels, 41 of 100 patches keep them all.
    """

    p_channel_dropout = 0.2

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        channels = [str(n) for n, scheme in enumerate(configuration.normalization_schemes) if scheme == _NOT_ZERO]
        if channels:
            raise InputError(
                f"{cls.__name__} sets channels to 0, the value of missing modalities; {_NOT_ZERO} of channel "
                f"{', '.join(channels)} in configuration {name} gives them another value. Choose another trainer."
            )
        return super().resolve(configuration, name)

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """Return the pipeline with channel dropout. Takes the arguments of nnU-Net's method of this name."""
        transforms = super().get_training_transforms(*args, **kwargs).transforms
        # The first transform after those of intensities; the transforms of a cascade follow it.
        position = next(number for number, one in enumerate(transforms) if isinstance(one, RemoveLabelTransform))
        dropout = ChannelDropoutTransform(cls.p_channel_dropout)
        return ComposeTransforms([*transforms[:position], dropout, *transforms[position:]])
