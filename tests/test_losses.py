"""The objective against plain loops, in edge cases, and over two processes."""

import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet
from nnunet_conres.losses import (
    ConResLoss,
    ResidualMapLoss,
    SegmentationLoss,
    SquaredDiceLoss,
    VoxelWeightedCrossEntropyLoss,
    residual_scale_weights,
)

PATCH = (6, 8, 8)


def loop_residual_loss(logits: list[np.ndarray], regions: np.ndarray) -> float:
    """Compute the residual loss from its definition, voxel by voxel, for fully annotated regions (B, C, X, Y, Z)."""
    residual = np.zeros(regions.shape, dtype=bool)
    residual[:, :, 1:] = regions[:, :, 1:] != regions[:, :, :-1]
    scale_weights = np.array([1.0] + [0.5] * (len(logits) - 1))
    total = 0.0
    for weight, logit in zip(scale_weights / scale_weights.sum(), logits, strict=True):
        window = [f // s for f, s in zip(residual.shape[2:], logit.shape[2:], strict=True)]
        per_channel = []
        for c in range(logit.shape[1]):
            terms, positives = [], 0
            for b, x, y, z in np.ndindex(logit.shape[0], *logit.shape[2:]):
                block = tuple(slice(i * w, (i + 1) * w) for i, w in zip((x, y, z), window, strict=True))
                target = residual[(b, c, *block)].any()
                probability = 1 / (1 + math.exp(-logit[b, c, x, y, z]))
                terms.append((target, -math.log(probability if target else 1 - probability)))
                positives += target
            positive_weight = math.log(len(terms) / (positives + 1))
            per_channel.append(np.mean([value * (positive_weight if target else 1) for target, value in terms]))
        total += weight * np.mean(per_channel)
    return total


def blob_regions(batch: int = 2) -> torch.Tensor:
    """Return nested boxes that change from slice to slice, (B, 2, X, Y, Z)."""
    regions = torch.zeros(batch, 2, *PATCH, dtype=torch.bool)
    for b in range(batch):
        regions[b, 0, 1 : 4 + b, 2:7, 1:6] = True
        regions[b, 1, 2:4, 3:5, 2 : 4 + b] = True
    return regions


def segmentation_loss(regions: bool, n_scales: int, ignore: bool = False, **dice: bool) -> nn.Module:
    """Return nnU-Net's loss as its trainer builds it and our trainers wrap it."""
    dice_kwargs = {"batch_dice": False, "smooth": 1e-5, "ddp": False} | dice
    if regions:
        loss = DC_and_BCE_loss(
            {}, dice_kwargs | {"do_bg": True}, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss
        )
    else:
        loss = DC_and_CE_loss(
            dice_kwargs | {"do_bg": False},
            {},
            ignore_label=3 if ignore else None,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    weights = [0.5**i for i in range(n_scales)]
    return SegmentationLoss(DeepSupervisionWrapper(loss, [w / sum(weights) for w in weights]))


class TestResidualMapLoss:
    def test_equals_loop(self) -> None:
        regions = blob_regions()
        logits = [torch.randn(2, 2, *PATCH), torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)]
        loss, defined = ResidualMapLoss(classes=None)(logits, regions)
        assert loss.item() == pytest.approx(loop_residual_loss([x.double().numpy() for x in logits], regions.numpy()))
        assert defined == 2 * math.prod(PATCH)

    def test_full_size_maps_of_coarser_levels_see_the_full_resolution_target(self) -> None:
        """The paper's maps are resized before they are compared."""
        regions = blob_regions()
        logits = [torch.randn(2, 2, *PATCH) for _ in range(3)]
        loss, _ = ResidualMapLoss(classes=None)(logits, regions)
        assert loss.item() == pytest.approx(loop_residual_loss([x.double().numpy() for x in logits], regions.numpy()))

    def test_labels_agree_with_regions(self) -> None:
        regions = blob_regions()
        regions[:, 0] &= ~regions[:, 1]
        labels = (regions[:, :1] * 1 + regions[:, 1:] * 2).to(torch.int16)
        logits = torch.randn(2, 2, *PATCH)
        from_labels, _ = ResidualMapLoss(classes=[1, 2])([logits], labels)
        from_regions, _ = ResidualMapLoss(classes=None)([logits], regions)
        assert from_labels.item() == pytest.approx(from_regions.item())

    def test_other_slice_axis(self) -> None:
        regions, logits = blob_regions(), torch.randn(2, 2, *PATCH)
        along_last, _ = ResidualMapLoss(classes=None, slice_axis=2)([logits], regions)
        moved, _ = ResidualMapLoss(classes=None)([logits.movedim(4, 2)], regions.movedim(4, 2))
        assert along_last.item() == pytest.approx(moved.item())

    def test_undefined_voxels_get_no_gradient(self) -> None:
        labels = torch.randint(0, 3, (1, 1, *PATCH), dtype=torch.int16)
        labels[:, :, 3] = 3
        logits = torch.randn(1, 2, *PATCH, requires_grad=True)
        loss, defined = ResidualMapLoss(classes=[1, 2], ignore_label=3)([logits], labels)
        loss.backward()
        assert defined == 3 * 64  # slices 1, 2 and 5
        for k in range(PATCH[0]):
            assert logits.grad[:, :, k].all().item() == (k in (1, 2, 5))

    def test_refuses_another_number_of_channels(self) -> None:
        with pytest.raises(ValueError, match="Residual maps have 3 channels"):
            ResidualMapLoss(classes=None)([torch.randn(2, 3, *PATCH)], blob_regions())

    def test_scale_weights(self) -> None:
        assert residual_scale_weights(3) == [0.5, 0.25, 0.25]
        assert residual_scale_weights(1) == [1.0]


class TestConResLoss:
    def outputs(self, channels: int, patch: tuple[int, ...] = PATCH) -> list[torch.Tensor]:
        """Return segmentation logits of all channels, then residual maps of two classes or regions."""
        coarse = tuple(-(-extent // 2) for extent in patch)
        sizes = [(channels, *patch), (channels, *coarse), (2, *patch), (2, *coarse)]
        return [torch.randn(2, *size, requires_grad=True) for size in sizes]

    def test_is_the_segmentation_loss_plus_the_weighted_residual_loss(self) -> None:
        outputs, regions = self.outputs(2), blob_regions()
        targets = [regions, regions[:, :, ::2, ::2, ::2]]
        segmentation, residual = segmentation_loss(True, 2), ResidualMapLoss(classes=None)
        objective = ConResLoss(segmentation, residual, n_segmentation_outputs=2, residual_weight=0.25)
        total = objective(outputs, targets)
        expected = segmentation(outputs[:2], targets), residual(outputs[2:], regions)[0]
        assert total.item() == pytest.approx(expected[0].item() + 0.25 * expected[1].item())
        assert objective.parts["segmentation"].item() == pytest.approx(expected[0].item())
        assert objective.parts["residual"].item() == pytest.approx(expected[1].item())

    @pytest.mark.parametrize("regions", [True, False])
    @pytest.mark.parametrize("case", ["unannotated", "background only", "all foreground", "single slice"])
    def test_edge_cases_are_finite(self, regions: bool, case: str) -> None:
        patch = (1, 8, 8) if case == "single slice" else PATCH
        label = {"unannotated": 3, "background only": 0, "all foreground": 1, "single slice": 1}[case]
        labels = torch.full((2, 1, *patch), label, dtype=torch.int16)
        target = torch.cat([(labels == 1) | (labels == 2), labels == 2, labels == 3], 1) if regions else labels
        coarse = tuple(-(-extent // 2) for extent in patch)
        targets = [target, torch.nn.functional.interpolate(target.float(), coarse).to(target.dtype)]
        outputs = self.outputs(2 if regions else 3, patch)
        objective = ConResLoss(
            segmentation_loss(regions, 2, ignore=True),
            ResidualMapLoss(classes=None if regions else [1, 2], ignore_label=3),
            n_segmentation_outputs=2,
        )
        total = objective(outputs, targets)
        total.backward()
        assert torch.isfinite(total)
        assert all(output.grad is not None and torch.isfinite(output.grad).all() for output in outputs)
        undefined = case in ("unannotated", "single slice")
        assert math.isnan(objective.parts["residual"].item()) == undefined

    def test_targets_of_strides_that_do_not_divide_the_patch(self) -> None:
        """nnU-Net rounds the target's size half to even, but a convolution rounds up."""
        patch = (5, 7, 9)
        target = torch.rand(2, 2, *patch) > 0.5
        targets = [target, torch.zeros(2, 2, 2, 4, 4, dtype=torch.bool)]
        objective = ConResLoss(segmentation_loss(True, 2), ResidualMapLoss(classes=None), n_segmentation_outputs=2)
        assert torch.isfinite(objective(self.outputs(2, patch), targets))

    def test_half_precision_outputs_are_summed_in_float32(self) -> None:
        outputs, regions = self.outputs(2), blob_regions()
        targets = [regions, regions[:, :, ::2, ::2, ::2]]
        objective = ConResLoss(segmentation_loss(True, 2), ResidualMapLoss(classes=None), n_segmentation_outputs=2)
        half = [output.detach().bfloat16() for output in outputs]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = objective(half, targets)
        assert total.dtype == torch.float32
        assert total.item() == pytest.approx(objective([h.float() for h in half], targets).item(), rel=1e-5)


def targets_and_logits(regions: bool, ignore: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a target of two labels or nested regions, and logits. The second case lacks the second label or region.

    With `ignore`, every other slice is unannotated.
    """
    labels = torch.randint(0, 3, (2, 1, *PATCH), dtype=torch.int16)
    labels[1][labels[1] == 2] = 0
    if ignore:
        labels[:, :, ::2] = 3
    if not regions:
        return labels, torch.randn(2, 3, *PATCH, requires_grad=True)
    channels = [(labels == 1) | (labels == 2), labels == 2] + ([labels == 3] if ignore else [])
    return torch.cat(channels, 1), torch.randn(2, 2, *PATCH, requires_grad=True)


def unannotated(target: torch.Tensor, regions: bool) -> torch.Tensor:
    return target[:, -1:].bool() if regions else target == 3


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
class TestPaperLosses:
    """V-Net's Dice and 3D U-Net's cross-entropy, each from its definition, voxel by voxel."""

    def test_squared_dice(self, regions: bool, ignore: bool) -> None:
        target, logits = targets_and_logits(regions, ignore)
        x, t = logits.detach().double().numpy(), target.numpy()
        dice = []
        for b in range(2):
            for c in range(2):
                overlap = squares = 0.0
                for index in np.ndindex(*PATCH):
                    voxel = (b, slice(None), *index)
                    if ignore and (t[voxel][-1] if regions else t[voxel][0] == 3):
                        continue
                    if regions:
                        p, g = 1 / (1 + math.exp(-x[voxel][c])), float(t[voxel][c])
                    else:
                        e = np.exp(x[voxel])
                        p, g = e[c + 1] / e.sum(), float(t[voxel][0] == c + 1)
                    overlap, squares = overlap + p * g, squares + p * p + g * g
                dice.append((2 * overlap + 1e-5) / (squares + 1e-5))
        loss = SquaredDiceLoss(regions, 3 if ignore else None)(logits, target)
        assert loss.item() == pytest.approx(-np.mean(dice), rel=1e-5)

    def test_voxel_weighted_cross_entropy(self, regions: bool, ignore: bool) -> None:
        target, logits = targets_and_logits(regions, ignore)
        x, t = logits.detach().double().numpy(), target.numpy()
        total = weights = 0.0
        for b, *index in np.ndindex(2, *PATCH):
            voxel = (b, slice(None), *index)
            if ignore and (t[voxel][-1] if regions else t[voxel][0] == 3):
                continue
            if regions:
                p = 1 / (1 + np.exp(-x[voxel]))
                entropy = -np.mean(np.log(np.where(t[voxel][:2], p, 1 - p)))
                weight = 3.0 if t[voxel][:2].any() else 0.2
            else:
                label = int(t[voxel][0])
                entropy = -math.log(np.exp(x[voxel])[label] / np.exp(x[voxel]).sum())
                weight = 3.0 if label else 0.2
            total, weights = total + weight * entropy, weights + weight
        loss = VoxelWeightedCrossEntropyLoss(regions, 3 if ignore else None, 0.2, 3.0)(logits, target)
        assert loss.item() == pytest.approx(total / weights, rel=1e-5)

    def test_nothing_annotated_or_nothing_there_is_finite(self, regions: bool, ignore: bool) -> None:
        target, logits = targets_and_logits(regions, ignore)
        target = torch.zeros_like(target)
        if ignore:
            target[:, -1:] = 1 if regions else 3
        for loss in (
            SquaredDiceLoss(regions, 3 if ignore else None),
            VoxelWeightedCrossEntropyLoss(regions, 3 if ignore else None),
        ):
            logits.grad = None
            value = loss(logits, target)
            (65536 * value).backward()  # initial scale of a GradScaler on a GPU
            assert torch.isfinite(value)
            assert torch.isfinite(logits.grad).all()
            assert not ignore or (logits.grad == 0).all()


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kind", ["nnU-Net", "V-Net", "3D U-Net", "ConResNet"])
def test_unannotated_voxels_get_no_gradient_at_all(regions: bool, kind: str) -> None:
    """Gradients must be exactly 0, because sparse annotation relies on it."""
    target, logits = targets_and_logits(regions, ignore=True)
    nnunet = segmentation_loss(regions, 1, ignore=True)
    losses = {
        "nnU-Net": nnunet,
        "V-Net": SegmentationLoss(DeepSupervisionWrapper(SquaredDiceLoss(regions, 3), [1.0])),
        "3D U-Net": SegmentationLoss(DeepSupervisionWrapper(VoxelWeightedCrossEntropyLoss(regions, 3), [1.0])),
    }
    if kind == "ConResNet":
        # two neighbouring annotated slices, so that a residual is defined somewhere
        target[:, :, 3] = target[:, :, 4] = target[:, :, 1]
        residual_logits = torch.randn(len(logits), 2, *logits.shape[2:], requires_grad=True)
        residual = ResidualMapLoss(classes=None if regions else [1, 2], ignore_label=3)
        ConResLoss(nnunet, residual, 1)([logits, residual_logits], [target]).backward()
        hidden = unannotated(target, regions)
        previous_hidden = torch.ones_like(hidden)
        previous_hidden[:, :, 1:] = hidden[:, :, :-1]
        undefined = (hidden | previous_hidden).expand_as(residual_logits)
        assert (residual_logits.grad[undefined] == 0).all()
        assert (residual_logits.grad[~undefined] != 0).any()
    else:
        losses[kind]([logits], [target]).backward()
    mask = unannotated(target, regions).expand_as(logits)
    assert mask.any()
    assert (logits.grad[mask] == 0).all()
    assert (logits.grad[~mask] != 0).any()


@pytest.mark.parametrize("weights", [(-1.0, 1.0), (0.0, 0.0)])
def test_weights_out_of_range_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative, nor all 0"):
        VoxelWeightedCrossEntropyLoss(False, None, *weights)


def _small_network() -> ConResNet:
    torch.manual_seed(3)
    return ConResNet(
        input_channels=1,
        num_classes=2,
        n_stages=2,
        features_per_stage=[4, 8],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2],
        n_blocks_per_stage=1,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
        residual_outputs=True,
    )


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    target = blob_regions(4)
    # the ranks get different shares of foreground
    target[2:] = False
    target[2, 0, 2:4, 1:3, 1:3] = True
    return torch.randn(4, 1, *PATCH, generator=generator), target


def _gradients(network: nn.Module, images: torch.Tensor, target: torch.Tensor, ddp: bool) -> list[torch.Tensor]:
    objective = ConResLoss(
        segmentation_loss(True, 1, batch_dice=True, ddp=ddp), ResidualMapLoss(classes=None, ddp=ddp), 1
    )
    objective(network(images), [target]).backward()
    return [parameter.grad for parameter in network.parameters()]


def _residual_gradients(ddp: bool, rank: int | None = None) -> list[torch.Tensor]:
    """Return gradients of the residual part alone, with unequal shares of annotated voxels per rank."""
    labels = torch.randint(0, 3, (4, 1, *PATCH), generator=torch.Generator().manual_seed(7), dtype=torch.int16)
    labels[1::2, :, 2:] = 3
    maps = [torch.randn(4, 2, *PATCH, generator=torch.Generator().manual_seed(8)) for _ in range(2)]
    share = slice(None) if rank is None else slice(rank, None, 2)
    scale = torch.ones(2, requires_grad=True)  # stands for a network: one factor per channel that all voxels share
    loss = ResidualMapLoss(classes=[1, 2], ignore_label=3, ddp=ddp)
    loss([one[share] * scale.view(1, 2, 1, 1, 1) for one in maps], labels[share])[0].backward()
    return [scale.grad]


def _sparse_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and label maps with unequal shares of annotated voxels per rank."""
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(0, 2, (4, 1, *PATCH), generator=generator, dtype=torch.int16)
    labels[1::2, :, 1:] = 3
    return torch.randn(4, 1, *PATCH, generator=generator), labels


def _strided_networks() -> list[nn.Module]:
    torch.manual_seed(4)
    given = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": [1, 2],
        "norm_op": nn.InstanceNorm3d,
        "deep_supervision": True,
    }
    return [VNet(1, num_classes=2, **given), UNet3D(1, num_classes=2, **given)]


def _sparse_gradients(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, ddp: bool) -> list[torch.Tensor]:
    loss = VoxelWeightedCrossEntropyLoss(False, 3, 0.5, 2.0, ddp=ddp)
    SegmentationLoss(DeepSupervisionWrapper(loss, [1.0]))(network(images), [labels]).backward()
    return [parameter.grad for parameter in network.parameters()]


def _ddp_worker(rank: int, port: int, result: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    # the default of DistributedDataParallel: a parameter without gradient is an error
    network = nn.parallel.DistributedDataParallel(_small_network())
    images, target = _batch()
    for _ in range(2):  # an unused parameter raises an error in the second step
        network.zero_grad()
        gradients = _gradients(network, images[rank::2], target[rank::2], ddp=True)
    partial = _residual_gradients(ddp=True, rank=rank)[0]
    torch.distributed.all_reduce(partial)  # what DistributedDataParallel does: average over the processes
    gradients = [*gradients, partial / 2]
    images, labels = _sparse_batch()
    for strided in _strided_networks():
        network = nn.parallel.DistributedDataParallel(strided)
        for _ in range(2):
            network.zero_grad()
            found = _sparse_gradients(network, images[rank::2], labels[rank::2], ddp=True)
        gradients += found
    if rank == 0:
        torch.save(gradients, result)
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = str(tmp_path / "gradients.pt")
    torch.multiprocessing.spawn(_ddp_worker, args=(port, result), nprocs=2)
    expected = _gradients(_small_network(), *_batch(), ddp=False) + _residual_gradients(ddp=False)
    for network in _strided_networks():
        expected += _sparse_gradients(network, *_sparse_batch(), ddp=False)
    for ours, theirs in zip(torch.load(result, weights_only=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
