"""The installed package as a wheel, and the versions of its dependencies: the environment for a container."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import nnunet_conres
from nnunet_conres.files import written_whole

DISTRIBUTION: Final = "nnunet-conres"

# In a checkout, these are in the folder that pyproject.toml names; otherwise they are beside the package.
_STARTUP_FILES: Final = ("nnunet_conres.pth", "nnunet_conres.start", "_nnunet_conres_startup.py")
_OF_THE_INSTALLATION: Final = ("RECORD", "INSTALLER", "REQUESTED", "WHEEL", "direct_url.json")
# Not pinned: torch itself requires these, in versions that differ between its builds.
_OF_TORCH: Final = re.compile(r"nvidia-.*|triton|pytorch-triton.*|cuda-.*")


def distribution_errors() -> Iterator[str]:
    """Yield a message if the running package is not the installed one."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != nnunet_conres.__version__:
        have = "is not installed" if version is None else f"is installed as version {version}"
        yield (
            f"{DISTRIBUTION} {have}, but version {nnunet_conres.__version__} runs. Containers need the installed "
            f"package: install it, for example with pip install --editable FOLDER."
        )


def write_wheel(folder: Path) -> Path:
    """Write the running package as a wheel; pip installs it like the original.

    Args:
        folder: Folder to write to.

    Returns:
        Path of the wheel.
    """
    package = Path(nnunet_conres.__file__).parent
    distribution = importlib.metadata.distribution(DISTRIBUTION)
    contents: dict[str, bytes] = {}
    own = package / "registration" / "site_packages"
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.parent != own and "__pycache__" not in path.parts and path.name[0] != ".":
            contents[path.relative_to(package.parent).as_posix()] = path.read_bytes()
    for name in _STARTUP_FILES:
        contents[name] = ((own if own.is_dir() else package.parent) / name).read_bytes()
    info = f"nnunet_conres-{distribution.version}.dist-info"
    for file in distribution.files or ():
        before, separator, name = file.as_posix().partition(".dist-info/")
        if separator and "/" not in before and name not in _OF_THE_INSTALLATION:
            contents[f"{info}/{name}"] = file.read_binary()
    contents[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: {DISTRIBUTION} {distribution.version}\nRoot-Is-Purelib: true\n"
        f"Tag: py3-none-any\n"
    ).encode()
    records = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in contents.items()]
    contents[f"{info}/RECORD"] = ("\n".join([*records, f"{info}/RECORD,,"]) + "\n").encode()

    wheel = folder / f"nnunet_conres-{distribution.version}-py3-none-any.whl"
    with written_whole(wheel) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            # A fixed date: the same package gives the same file.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def pinned_requirements() -> tuple[list[str], list[str]]:
    """Return the dependencies of this package in their installed versions.

    Returns:
        Lines NAME==VERSION for pip, sorted; and warnings about dependencies that are not pinned, or that a package
        index may not have in this form.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    pinned: dict[str, str] = {}
    unfit: set[str] = set()  # installed in a version that pip would reject
    warnings: list[str] = []

    def add(name: str, extras: frozenset[str]) -> None:
        distribution = importlib.metadata.distribution(name)
        for text in distribution.requires or ():
            requirement = Requirement(text)
            wanted = canonicalize_name(requirement.name)
            marker = requirement.marker
            needed = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})
            if not needed or _OF_TORCH.fullmatch(wanted):
                continue
            try:
                found = importlib.metadata.distribution(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                warnings.append(f"{distribution.name} needs {requirement}, which is not installed here: not pinned.")
                continue
            version = Version(found.version)
            if not requirement.specifier.contains(version, prereleases=True):
                warnings.append(f"{distribution.name} needs {requirement}; {version} is installed here, so not pinned.")
                unfit.add(wanted)
            if wanted in pinned:
                continue
            pinned[wanted] = version.public
            origin = _origin(found)
            if origin:
                warnings.append(
                    f"{wanted} {found.version} is installed from {origin}; the container gets the release "
                    f"{version.public} from pip's package index."
                )
            add(requirement.name, frozenset(requirement.extras))

    add(DISTRIBUTION, frozenset())
    return [f"{name}=={version}" for name, version in sorted(pinned.items()) if name not in unfit], warnings


def _origin(distribution: importlib.metadata.Distribution) -> str:
    """Return the source that a package was installed from; empty if it was an index."""
    text = distribution.read_text("direct_url.json")
    return str(json.loads(text).get("url", "a file")) if text else ""
