"""Channels dropped from patches, against nnU-Net's preprocessing of an image that is 0 everywhere."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.augmentation.channel_dropout import ChannelDropoutTransform
from nnunet_conres.errors import InputError
from nnunet_conres.submission.models import drops_channels
from nnunet_conres.trainers import nnUNetTrainerConResNet_ChannelDropout, nnUNetTrainerMuon_ChannelDropout


@pytest.mark.parametrize("masked", [False, True])
def test_a_dropped_channel_is_as_that_of_a_zero_image(masked: bool) -> None:
    rng = np.random.default_rng(0)
    segmentation = np.where(rng.random((4, 5, 6)) < 0.5, -1, 0)
    absent = ZScoreNormalization(use_mask_for_norm=masked, intensityproperties={}).run(
        np.zeros((4, 5, 6), np.uint8), segmentation
    )
    image = torch.from_numpy(rng.normal(size=(2, 4, 5, 6)).astype(np.float32))
    present = image[1].clone()
    transform = ChannelDropoutTransform(0.5)
    dropped = transform.apply({"image": image, "segmentation": torch.from_numpy(segmentation)}, dropped=[0])["image"]
    np.testing.assert_array_equal(dropped[0].numpy(), absent)
    torch.testing.assert_close(dropped[1], present, rtol=0, atol=0)


def test_each_channel_with_the_probability_and_never_all() -> None:
    """The frequency of every set of channels, within four standard deviations of its probability."""
    p, draws = 0.6, 4000
    transform = pickle.loads(pickle.dumps(ChannelDropoutTransform(p)))
    image = torch.empty(3, 1, 1, 1)
    counts = Counter(tuple(transform.get_parameters(image=image)["dropped"]) for _ in range(draws))
    all_but_one = p**2 * (1 - p) + p**3 / 3
    expected = {(): (1 - p) ** 3, (0, 1): all_but_one, (0, 2): all_but_one, (1, 2): all_but_one}
    expected |= {(channel,): p * (1 - p) ** 2 for channel in range(3)}
    assert sum(expected.values()) == pytest.approx(1)
    assert set(counts) == set(expected)
    for channels, probability in expected.items():
        spread = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[channels] / draws - probability) < 4 * spread


def test_one_channel_stays() -> None:
    assert ChannelDropoutTransform(1).get_parameters(image=torch.empty(1, 2, 2, 2)) == {"dropped": []}


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_probabilities(p: float) -> None:
    with pytest.raises(ValueError, match=r"must be a probability in 0\.\.1"):
        ChannelDropoutTransform(p)


class TestTrainers:
    @pytest.mark.parametrize("trainer_class", [nnUNetTrainerConResNet_ChannelDropout, nnUNetTrainerMuon_ChannelDropout])
    def test_the_pipeline(self, trainer_class: type[nnUNetTrainer]) -> None:
        arguments = ((8, 8, 8), (-0.3, 0.3), [[1, 1, 1]], (0, 1, 2), False)
        options = {"use_mask_for_norm": [True, True], "is_cascaded": True, "foreground_labels": [1, 2]}
        stock = [type(t).__name__ for t in nnUNetTrainer.get_training_transforms(*arguments, **options).transforms]
        pipeline = trainer_class.get_training_transforms(*arguments, **options)
        ours = [type(t).__name__ for t in pipeline.transforms]
        position = ours.index("ChannelDropoutTransform")
        assert ours[:position] + ours[position + 1 :] == stock
        assert ours[position - 1] == "MaskImageTransform"
        assert ours.index("MoveSegAsOneHotToDataTransform") > position

        # Image channels are dropped as a whole. Channels that the cascade adds are not dropped.
        seen = set()
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            labels = torch.randint(0, 3, (2, 12, 12, 12), generator=generator, dtype=torch.int16)
            data = {"image": torch.rand(2, 12, 12, 12, generator=generator) + 1, "segmentation": labels}
            image = pipeline(**data)["image"]
            assert len(image) == 4
            seen.add(tuple(bool(channel.any()) for channel in image[:2]))
        assert seen == {(True, True), (True, False), (False, True)}

    def test_predict_brats_knows_them(self) -> None:
        assert drops_channels("nnUNetTrainerMuon_ChannelDropout")
        assert not drops_channels("nnUNetTrainerMuon")

    def test_other_normalisations_are_refused(self) -> None:
        class Configuration:
            normalization_schemes = ("ZScoreNormalization", "CTNormalization")

        with pytest.raises(InputError, match="CTNormalization of channel 1 in configuration 3d_fullres"):
            nnUNetTrainerMuon_ChannelDropout.resolve(Configuration(), "3d_fullres")
