"""The trainers of nnunet-conres, for nnU-Net's search of external folders. Only nnU-Net imports this module.

nnU-Net imports every module in this folder by its bare name, whichever trainer it looks for, and then reads the
attribute with the trainer's name. No trainer is imported until one of ours is requested. So a process in another
environment that inherited the folder, where this package or its dependencies may be missing, finds its own trainers
undisturbed.
"""

import sys
from importlib import import_module
from os.path import abspath, dirname, samefile
from typing import Any


def __getattr__(name: str) -> Any:
    # After an AttributeError nnU-Net continues its search; any other exception reaches the user.
    missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        package = import_module("nnunet_conres")
    except ModuleNotFoundError as error:
        if error.name != "nnunet_conres":
            raise
        raise missing from error
    try:
        if name.startswith("nnUNetTrainer"):
            import_module("nnunet_conres.refusals").show_in_one_line()
        if name not in import_module("nnunet_conres.families").TRAINERS:
            raise missing
        problem = import_module("nnunet_conres.registration.nnunet_version").version_problem()
        if problem is not None:
            print(f"nnunet-conres: error: {problem}", file=sys.stderr)
            raise missing
        return getattr(import_module("nnunet_conres.trainers"), name)
    except Exception as error:
        if error is missing:
            raise
        reason = f"{name} could not be loaded from {package.__path__[0]}: {type(error).__name__}: {error}"
        if _is_part_of(package):
            # An error of this package or its environment. nnU-Net would take an AttributeError for "not found".
            raise ImportError(reason) from error
        # The package is another installation, possibly of another version. It has its own trainer folder, which reports
        # its errors.
        print(f"nnunet-conres: warning: {reason}", file=sys.stderr)
        raise missing from error


def _is_part_of(package: Any) -> bool:
    # __file__ is None for a namespace package, such as the remains of a package without its __init__.py.
    if package.__file__ is None:
        return False
    return samefile(dirname(package.__file__), dirname(dirname(dirname(abspath(__file__)))))
