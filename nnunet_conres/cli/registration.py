"""Arguments of `nnunet-conres info`."""

import argparse
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_info(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "info",
        help="show versions, whether nnU-Net finds the trainers, and the list of trainers",
        description="Shows versions, whether nnU-Net finds the trainers, and the list of trainers. The exit code is 0 "
        "if nnU-Net finds the trainers, else 1.",
    )
    parser.add_argument("--all", action="store_true", help="list trainers with every training length")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(handler=_info)


def _info(arguments: argparse.Namespace) -> int:
    from nnunet_conres.registration.info import collect

    info = collect()
    if arguments.json:
        import json

        print(json.dumps(info.as_json(), indent=2))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(info.as_text(every_length=arguments.all, width=width))
    return 0 if info.ok else 1
