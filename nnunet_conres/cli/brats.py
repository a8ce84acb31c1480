"""Arguments of the commands for BraTS."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import fold, number_of_processes

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers

_SCHEMES = (
    "2018 (also 2017, 2019, 2020), 2021, 2023, 2023-MEN, 2023-MET (also 2024-MET), 2023-PED, 2023-SSA, 2024 (after "
    "treatment), 2024-GoAT, 2024-MEN-RT, 2024-PED (also 2025-, 2026-PED), 2025-GLI (before and after treatment), "
    "2025-MET (also 2026-MET), MSD (Decathlon), or a TOML file that describes another scheme"
)


def add_brats_convert(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "brats-convert",
        help="convert BraTS folders to an nnU-Net data set",
        description="Converts BraTS folders to an nnU-Net data set in $nnUNet_raw. For every year, the channels are "
        "FLAIR, T1, T1ce, T2, and the regions are whole_tumor, tumor_core, enhancing_tumor and those that the year "
        "adds. MEN-RT has only the channel T1ce and the region gross_tumor_volume. Labelled cases are for training, "
        "others go to imagesTs. The command checks all files before it writes the data set.",
    )
    parser.add_argument(
        "-i", metavar="FOLDER", nargs="+", required=True, help="input folders, searched with subfolders"
    )
    parser.add_argument("-d", metavar="ID", type=int, required=True, help="nnU-Net's data set id, for example 501")
    parser.add_argument(
        "-name", metavar="NAME", default="BraTS", help="data set name after the id (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out",
        metavar="FOLDER",
        nargs="+",
        default=[],
        help="folders with cases that are never used for training: images go to imagesTs, labels to labelsTs",
    )
    parser.add_argument(
        "--corrected",
        metavar="FOLDER",
        nargs="+",
        default=[],
        help="folders with corrected files, which replace the files of the same cases",
    )
    parser.add_argument(
        "--scheme",
        metavar="SCHEME",
        nargs="+",
        default=["auto"],
        help=f"scheme of the file names and labels: {_SCHEMES}; name several schemes to allow a mixture; auto detects "
        "one scheme from the file names (default: auto)",
    )
    parser.add_argument(
        "--mode",
        choices=("regions", "labels"),
        default="regions",
        help="train on nested regions, or on the single tissues as labels (default: %(default)s)",
    )
    parser.add_argument(
        "--transfer",
        choices=("link", "copy"),
        default="link",
        help="make hard links to the images where possible, or copy them (default: %(default)s)",
    )
    parser.add_argument(
        "--missing",
        choices=("refuse", "zero"),
        default="refuse",
        help="cases without one of their modalities: refuse them, or write a zero image in its place and record it in "
        "cases.json (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out cases with errors and list them, instead of stopping"
    )
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_brats_convert)


def _brats_convert(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.brats import convert_brats
    from nnunet_conres.errors import grouped
    from nnunet_conres.text import first_few

    done = convert_brats(
        arguments.i,
        arguments.d,
        held_out_folders=arguments.held_out,
        corrected_folders=arguments.corrected,
        dataset_name=arguments.name,
        schemes=arguments.scheme,
        mode=arguments.mode,
        image_mode=arguments.transfer,
        missing=arguments.missing,
        skip_bad=arguments.skip_bad,
        processes=number_of_processes(arguments.np),
    )
    for error in grouped([error for errors in done.skipped.values() for error in errors]):
        print(f"left out: {error}", file=sys.stderr)
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{done.dataset_folder}")
    print(f"  training cases: {len(done.training_ids)}")
    print(f"  test cases:     {len(done.test_ids)}, {len(done.test_label_ids)} of them with labels")
    if done.skipped:
        print(f"  left out:       {len(done.skipped)}: {first_few(list(done.skipped), 20)}")
    print("  image files:    " + ", ".join(f"{count} {how}" for how, count in done.transfers.items() if count))
    if done.missing:
        print(f"  zero images:    in {len(done.missing)} cases without a modality: {first_few(list(done.missing), 20)}")
    print(f"  scheme:         {', '.join(done.schemes)}")
    if done.training_ids:
        print(f"Next: nnUNetv2_plan_and_preprocess -d {arguments.d} -c 3d_fullres --verify_dataset_integrity")
    return 0


def add_brats_export(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "brats-export",
        help="write predictions in the format of a BraTS challenge",
        description="Writes predictions with the labels of a BraTS challenge, one file CASE.nii.gz per case. The "
        "predictions must be nnU-Net's, for a data set of brats-convert. The command checks all files before it writes "
        "the output folder.",
    )
    parser.add_argument("-i", metavar="FOLDER", required=True, help="folder with predictions")
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder, new or empty")
    parser.add_argument(
        "--scheme",
        metavar="SCHEME",
        required=True,
        help=f"the challenge: {_SCHEMES}",
    )
    parser.add_argument(
        "-djfile", metavar="FILE", help="dataset.json of the data set (default: the one in the folder with predictions)"
    )
    parser.add_argument(
        "-ref", metavar="FOLDER", help="folder with the cases' images, to check size and geometry of the predictions"
    )
    parser.add_argument(
        "--et-min-voxels",
        metavar="N",
        type=int,
        default=0,
        help="replace enhancing tumour by necrosis in cases with fewer voxels of it (default: never)",
    )
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_brats_export)


def _brats_export(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.brats_export import export_brats

    done = export_brats(
        arguments.i,
        arguments.o,
        arguments.scheme,
        dataset_json=arguments.djfile,
        reference_folder=arguments.ref,
        et_min_voxels=arguments.et_min_voxels,
        processes=number_of_processes(arguments.np),
    )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{done.folder}: {len(done.case_ids)} cases")
    for case_id, voxels in done.cleaned.items():
        print(f"  {case_id}: {voxels} voxels of enhancing tumour replaced")
    return 0


_MISSING = (
    "cases without one of their modalities: refuse them, or predict them with a zero image in its place (default: "
    "predict a case if training cases lacked the same modality, and all cases with a ..._ChannelDropout trainer)"
)


def add_predict_brats(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "predict-brats",
        help="predict the cases of a BraTS challenge; the container of package runs this command",
        description="Reads cases in a BraTS challenge's layout, predicts them and writes OUTPUT/CASE.nii.gz with the "
        "challenge's labels and in the case's geometry. A case that fails does not stop the others: "
        "OUTPUT/predict-brats.json lists the result of each case. Exit code 0: all cases were written; 1: some cases "
        "failed; 2: no case was predicted.",
    )
    parser.add_argument("-i", metavar="FOLDER", required=True, help="folder with a folder for each case")
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder")
    parser.add_argument(
        "-m",
        metavar="MODEL",
        required=True,
        help="folder of a trained model: nnU-Net's TRAINER__PLANS__CONFIGURATION, or the folder model that "
        "nnunet-conres package writes",
    )
    _add_challenge(parser)
    parser.add_argument(
        "-f", metavar="FOLD", type=fold, nargs="+", help="folds to average (default: all folds of the model)"
    )
    parser.add_argument(
        "-device", choices=("cuda", "cpu", "mps"), help="where to predict (default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "-step_size", metavar="S", type=float, default=0.5, help="step of the sliding window (default: %(default)s)"
    )
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, often less accurate")
    parser.set_defaults(handler=_predict_brats)


def _add_challenge(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `package` passes on to `predict-brats`."""
    parser.add_argument(
        "--scheme", metavar="SCHEME", help=f"the challenge: {_SCHEMES} (default: scheme of the model's data set)"
    )
    parser.add_argument("--missing", choices=("refuse", "zero"), help=_MISSING)
    parser.add_argument("--postprocessing", metavar="JSON", help="file that nnunet-conres postprocess fit wrote")
    parser.add_argument(
        "-chk", metavar="FILE", default="checkpoint_final.pth", help="name of the checkpoint (default: %(default)s)"
    )


def _predict_brats(arguments: argparse.Namespace) -> int:
    from nnunet_conres.submission.predict import predict_brats

    done = predict_brats(
        arguments.i,
        arguments.o,
        arguments.m,
        scheme=arguments.scheme,
        folds=arguments.f,
        checkpoint=arguments.chk,
        missing=arguments.missing,
        postprocessing=arguments.postprocessing,
        device=arguments.device,
        mirroring=not arguments.disable_tta,
        step_size=arguments.step_size,
    )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for name, messages in done.failed.items():
        for message in messages:
            print(f"{name} failed: {message}", file=sys.stderr)
    print(f"{arguments.o}: {len(done.written)} cases, {len(done.failed)} failed")
    return 1 if done.failed else 0


def add_package(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "package",
        help="write a folder to build a BraTS challenge's container from",
        description="Writes a folder with a Dockerfile and an Apptainer definition, pinned versions, this package, and "
        "the model's weights without the state of its optimiser. The container reads /input/CASE/..., runs "
        "nnunet-conres predict-brats and writes /output/CASE.nii.gz; it needs no network.",
    )
    parser.add_argument("-d", metavar="ID", required=True, help="data set that the model was trained on: id or name")
    parser.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainerConResNet", help="default: %(default)s")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="default: %(default)s")
    parser.add_argument("-c", metavar="CONFIGURATION", default="3d_fullres", help="default: %(default)s")
    parser.add_argument(
        "-f",
        metavar="FOLD",
        type=fold,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help="folds to average (default: 0 1 2 3 4)",
    )
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder, new or empty")
    _add_challenge(parser)
    parser.set_defaults(handler=_package)


def _package(arguments: argparse.Namespace) -> int:
    from nnunet_conres.nnunet import Model
    from nnunet_conres.submission.package import package_model

    done = package_model(
        arguments.d,
        Model(arguments.tr, arguments.p, arguments.c),
        arguments.f,
        arguments.o,
        scheme=arguments.scheme,
        missing=arguments.missing,
        postprocessing=arguments.postprocessing,
        checkpoint=arguments.chk,
    )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{done.folder}")
    print(f"  weights: {done.model_bytes / 2**20:.1f} MiB of checkpoints with {done.checkpoint_bytes / 2**20:.1f} MiB")
    print(f"  runs:    {' '.join(done.command)} -i /input -o /output")
    print(f"Next: {shlex.join(['docker', 'build', '-t', 'submission', str(done.folder)])}")
    return 0


def add_phantom(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "phantom",
        help="write synthetic brain tumour cases in BraTS's layout",
        description="Writes synthetic, labelled brain tumour cases in the layout of BraTS 2018: a folder "
        "training and a folder held_out. They serve to try the commands, not for science.",
    )
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder, new or empty")
    parser.add_argument("-n", metavar="N", type=int, default=10, help="number of training cases (default: %(default)s)")
    parser.add_argument(
        "--held-out", metavar="N", type=int, default=3, help="number of held-out cases (default: %(default)s)"
    )
    parser.add_argument(
        "--shape", metavar=("X", "Y", "Z"), type=int, nargs=3, help="voxels along each axis (default: 64 64 48)"
    )
    parser.add_argument(
        "--spacing", metavar=("X", "Y", "Z"), type=float, nargs=3, help="voxel size in mm (default: 3 3 3)"
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=0, help="the same seed gives the same cases (default: 0)"
    )
    parser.set_defaults(handler=_phantom)


def _phantom(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.phantom import DEFAULT_SHAPE, DEFAULT_SPACING, write_brats_phantoms

    written = write_brats_phantoms(
        arguments.o,
        training_cases=arguments.n,
        held_out_cases=arguments.held_out,
        shape=arguments.shape or DEFAULT_SHAPE,
        spacing=arguments.spacing or DEFAULT_SPACING,
        seed=arguments.seed,
    )
    print(f"{len(written.training_ids)} training cases in {written.training}")
    print(f"{len(written.held_out_ids)} held-out cases in {written.held_out}")
    return 0
