"""Add the trainer folder of nnunet-conres to those that nnU-Net searches, at every start of Python.

The files in this folder are installed at the top of site-packages, where Python looks for start-up files. This module
is not part of the package, so that no start of Python imports the package. Otherwise a program in a checkout would get
the installed copy, because Python adds the program's own folder to the path later. Also, a package that was removed, or
whose editable checkout was moved, causes no error here.
"""

import os
import sys

activated_by = None
"""Name of the start-up file that called `activate` successfully; None if none has."""


def activate(startup_file="nnunet_conres.start"):
    """Append the trainer folder to ``nnUNet_extTrainer``: last, and once. Never raise an exception.

    Nothing is imported, because each import takes longer than the whole function. Other folders in the variable are not
    accessed, because they may be on a network file system that is slow or gone.

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
    except Exception:  # it would be shown at every start of Python
        pass


def _warn_if_nnunet_is_too_old():
    """Warn here, because commands of nnU-Net before 2.8 never search the folder."""
    command = " ".join(sys.orig_argv)
    if "nnUNetTrainer" in command and any(os.path.basename(word)[:9] == "nnUNetv2_" for word in sys.orig_argv):
        from nnunet_conres.registration.nnunet_version import warn_if_too_old_for

        warn_if_too_old_for(command)
