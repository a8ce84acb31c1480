"""The trainers of nnunet-conres, for nnU-Net's search of external folders; nobody else imports this.

nnU-Net imports every module in this folder by its bare name, whichever trainer it looks for, and then asks it for the
attribute of that name. No trainer is imported before one of ours is asked for. So a process of another environment that
inherited the folder, in which this package or what it needs may be missing, looks up its own trainers undisturbed.
"""

import sys
from importlib import import_module
from os.path import abspath, dirname, samefile
from typing import Any


def __getattr__(name: str) -> Any:
    # An AttributeError tells nnU-Net "not here", and it goes on searching; everything else reaches the user.
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
            # An error of this package or of its environment. As an AttributeError it would pass for "not here".
            raise ImportError(reason) from error
        # Another environment's installation, of another version perhaps, has its own folder to be searched, and
        # speaks for itself there.
        print(f"nnunet-conres: warning: {reason}", file=sys.stderr)
        raise missing from error


def _is_part_of(package: Any) -> bool:
    # None is the file of a namespace package, which is what is left of a package without its __init__.py.
    if package.__file__ is None:
        return False
    return samefile(dirname(package.__file__), dirname(dirname(dirname(abspath(__file__)))))
