"""Adds the trainers of nnunet-conres to those that nnU-Net searches, at every start of Python.

The files in this folder are installed at the top of site-packages, where Python looks for start-up files. This module
is not part of the package, so that no start of Python imports the package. A program in a checkout would otherwise get
the installed copy, because Python adds the program's own folder to the path later. Also, a package that was removed, or
moved away from under an editable installation, causes no error here.
"""

import os
import sys

activated_by = None
"""Name of the start-up file that called `activate`; None if none has, or without success."""


def activate(startup_file="nnunet_conres.start"):
    """Appends the folder with our trainers to ``nnUNet_extTrainer``: last, and once. Never raises.

    Imports nothing, since each import takes longer than all of this. Does not look at other folders in the variable,
    since they may lie on a network file system that is slow or gone.

    Args:
        startup_file: Name of the file that Python has read; a line of a ``.start`` file passes no arguments.
    """
    global activated_by
    if activated_by is not None:  # in a virtual environment, Python before 3.15 reads start-up files twice
        return
    try:
        for folder in sys.path:
            own = os.path.abspath(os.path.join(folder, "nnunet_conres", "registration", "external_trainers"))
            if os.path.isdir(own):
                folders = [one for one in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if one.strip()]
                if os.path.normcase(own) not in [os.path.normcase(os.path.normpath(one)) for one in folders]:
                    os.environ["nnUNet_extTrainer"] = os.pathsep.join([*folders, own])
                activated_by = startup_file
                _warn_if_nnunet_is_too_old()
                break
    except Exception:  # shown at every start of Python otherwise, whatever it is started for
        pass


def _warn_if_nnunet_is_too_old():
    """A command of an nnU-Net before 2.8 never looks into the folder, so the user learns it here."""
    command = " ".join(sys.orig_argv)
    if "nnUNetTrainer" in command and any(os.path.basename(word)[:9] == "nnUNetv2_" for word in sys.orig_argv):
        from nnunet_conres.registration.nnunet_version import warn_if_too_old_for

        warn_if_too_old_for(command)
