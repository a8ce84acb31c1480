"""Check that the installed nnU-Net is recent enough, from its metadata, without importing it or torch."""

import re
import sys
from importlib import metadata

from nnunet_conres.families import TRAINERS
from nnunet_conres.registration import MINIMUM_NNUNET


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, None if it is not installed or its metadata can't be read."""
    try:
        # The annotation promises a string; a damaged installation has been seen to yield None.
        return metadata.version(distribution) or None
    except Exception:  # whatever is wrong with the metadata, there is no version to report
        return None


def is_recent_enough(version: str) -> bool:
    """Return whether a version of nnU-Net has the search of external folders that this package relies on.

    Args:
        version: As in its metadata, for example ``"2.8.1"`` or ``"2.8.0.dev3+g1a2b3c"``. A version that does not start
            with numbers counts as recent enough: it can only be a custom build.
    """
    numbers = re.match(r"v?(\d+)(?:\.(\d+))?", version.strip())
    return numbers is None or (int(numbers[1]), int(numbers[2] or 0)) >= MINIMUM_NNUNET


def version_problem() -> str | None:
    """Return a message if nnU-Net is missing or too old, with advice; None if it is recent enough."""
    version = installed_version("nnunetv2")
    needed = ".".join(map(str, MINIMUM_NNUNET))
    command = f'pip install --upgrade "nnunetv2>={needed},<{MINIMUM_NNUNET[0] + 1}"'
    if version is None:
        return f"nnU-Net is not installed, nnunet-conres needs nnunetv2 >= {needed}. Install it: {command}"
    if not is_recent_enough(version):
        return f"nnU-Net {version} is too old, nnunet-conres needs nnunetv2 >= {needed}. Update it: {command}"
    return None


def warn_if_too_old_for(command: str) -> None:
    """Print to stderr if a command line names one of our trainers and the installed nnU-Net is too old to find it.

    Print nothing if no nnU-Net is found: this runs while Python starts, and the folder with nnU-Net may be added to the
    path later.
    """
    if any(name in command for name in TRAINERS) and installed_version("nnunetv2") is not None:
        problem = version_problem()
        if problem is not None:
            print(f"nnunet-conres: error: {problem}", file=sys.stderr)
