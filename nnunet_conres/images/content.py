"""Check that image files are complete: ITK, which nnU-Net reads images with, silently fills missing data with zeros."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Final

from nnunet_conres.errors import InputError

_GZIP: Final = b"\x1f\x8b"

# Bytes per voxel by GIPL's type code.
_GIPL_TYPES: Final = {7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
_GIPL_HEADER: Final = 256

CHECKED: Final = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".gipl.gz", ".tif", ".tiff")
"""Endings of the formats whose files are checked for completeness, by ITK or by this module."""


class DamagedFileError(InputError):
    """A file is cut short, or does not match its checksum. Only another copy of the file helps."""


def read_content(path: Path) -> tuple[bytes, bool]:
    """Read a whole file, and decompress it if it is compressed with gzip, whatever its name says.

    Bytes after the end of the compressed data are ignored, as in ITK and nibabel.

    Args:
        path: The file.

    Returns:
        The content, and whether it was compressed.

    Raises:
        DamagedFileError: The compressed data are cut short or do not match their checksum.
        InputError: The file can't be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, str(error.strerror or error)) from error
    if not content:
        raise damaged(path, "it is empty")
    if not content.startswith(_GZIP):
        return content, False
    parts = []
    rest = content
    while rest.startswith(_GZIP):
        # A file may consist of several gzip streams in a row.
        decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            parts.append(decompressor.decompress(rest))
        except zlib.error as error:
            if parts:
                break  # bytes after the end that only look like another stream
            raise damaged(path, "its compressed data are damaged (they do not match their checksum)") from error
        if not decompressor.eof:
            raise damaged(path, "it is cut short, before the end of its compressed data")
        rest = decompressor.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts), True


def check_whole(path: Path) -> None:
    """Check that a file is not cut short or damaged, if its reader would not notice.

    Args:
        path: A file in any of nnU-Net's formats except NIfTI, which `nifti.read_nifti` checks.

    Raises:
        DamagedFileError: It is cut short, or does not match its checksum.
        InputError: It can't be read.
    """
    name = path.name.lower()
    if name.endswith((".tif", ".tiff")):
        _check_tiff(path)
        return
    content, _ = read_content(path)
    if name.endswith((".gipl", ".gipl.gz")):
        _check_gipl(path, content)
    elif name.endswith(".mha"):
        _check_metaimage(path, content)
    elif name.endswith(".nrrd"):
        _check_nrrd(path, content)


def unreadable(path: Path, reason: str) -> InputError:
    """Return the error for a file that can't be read."""
    return InputError(f"{path} cannot be read: {reason}.")


def damaged(path: Path, reason: str) -> DamagedFileError:
    """Return the error for a file that is incomplete or damaged."""
    return DamagedFileError(f"{path} cannot be read: {reason}.")


def too_short(path: Path, size: int, expected: int) -> DamagedFileError:
    """Return the error for a file that has fewer bytes than its header says."""
    return damaged(path, f"it is cut short: {size} bytes, its header says {expected}")


def _check_gipl(path: Path, content: bytes) -> None:
    """Check the length of a GIPL file: ITK reads a file of any length."""
    if len(content) < _GIPL_HEADER:
        raise too_short(path, len(content), _GIPL_HEADER)
    # Big-endian: four extents, of which unused ones are 0 or 1, then the type.
    extents = [int.from_bytes(content[at : at + 2], "big") for at in range(0, 8, 2)]
    code = int.from_bytes(content[8:10], "big")
    if code not in _GIPL_TYPES:
        raise unreadable(path, f"its header has an unknown voxel type, {code}")
    expected = _GIPL_HEADER + math.prod(max(1, extent) for extent in extents) * _GIPL_TYPES[code]
    if len(content) < expected:
        raise too_short(path, len(content), expected)


def _check_metaimage(path: Path, content: bytes) -> None:
    """Check a MetaImage file: ITK reads damaged compressed voxels as zeros, and calls a truncated file "not found"."""
    fields = {}
    at = 0
    while "ElementDataFile" not in fields:
        end = content.find(b"\n", at)
        if end < 0:
            raise damaged(path, "it is cut short, within its header")
        key, _, value = content[at:end].decode("latin-1").partition("=")
        fields[key.strip()] = value.strip()
        at = end + 1
    if fields["ElementDataFile"].upper() != "LOCAL":
        return
    if fields.get("CompressedData", "").lower() in ("true", "1"):
        _check_stream(path, content[at:])
        return
    sizes = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
    item = sizes.get(fields.get("ElementType", "").removeprefix("MET_").removeprefix("U"))
    extents = fields.get("DimSize", "").split()
    if item is None or not all(extent.isdigit() for extent in extents):
        return  # colours and other types: ITK checks their length
    expected = at + math.prod(map(int, extents)) * item * int(fields.get("ElementNumberOfChannels") or 1)
    if len(content) < expected:
        raise too_short(path, len(content), expected)


def _check_nrrd(path: Path, content: bytes) -> None:
    """Check the checksum of compressed voxels in an NRRD file: ITK checks only the number of voxels."""
    # An empty line ends the header.
    ends = [at + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (at := content.find(mark)) >= 0]
    if not ends:
        raise damaged(path, "it is cut short, within its header")
    head, voxels = content[: min(ends)], content[min(ends) :]
    fields = dict(
        (key.strip().lower(), value.strip().lower())
        for key, colon, value in (line.partition(": ") for line in head.decode("latin-1").splitlines())
        if colon
    )
    detached = {"data file", "datafile"} & fields.keys()
    if fields.get("encoding") in ("gzip", "gz") and not detached and not {"line skip", "byte skip"} & fields.keys():
        _check_stream(path, voxels)


def _check_stream(path: Path, compressed: bytes) -> None:
    """Check data compressed by zlib or gzip."""
    decompressor = zlib.decompressobj(32 + zlib.MAX_WBITS)
    try:
        decompressor.decompress(compressed)
    except zlib.error as error:
        raise damaged(path, "its compressed data are damaged (they do not match their checksum)") from error
    if not decompressor.eof:
        raise damaged(path, "it is cut short, before the end of its compressed data")


def _check_tiff(path: Path) -> None:
    """Check the chain of pages in a TIFF file: if it breaks off, tifffile and ITK silently return fewer slices."""
    import tifffile

    try:
        size = path.stat().st_size
        with tifffile.TiffFile(path) as file:
            handle, form = file.filehandle, file.tiff
            # Each page has its number of tags, the tags, and the offset of the next page; offset 0 ends the chain.
            at, met = form.offsetsize if form.is_bigtiff else 4, set()
            while True:
                handle.seek(at)
                following = handle.read(form.offsetsize)
                page = int.from_bytes(following, "little" if form.byteorder == "<" else "big")
                if page == 0 and len(following) == form.offsetsize:
                    return
                if page >= size or page in met or len(following) < form.offsetsize:
                    raise damaged(path, "it is cut short: its chain of slices breaks off")
                met.add(page)
                handle.seek(page)
                tags = int.from_bytes(handle.read(form.tagnosize), "little" if form.byteorder == "<" else "big")
                at = page + form.tagnosize + tags * form.tagsize
    except InputError:
        raise
    except (OSError, ValueError, tifffile.TiffFileError) as error:
        raise unreadable(path, f"it is not a TIFF file, or is damaged ({str(error).splitlines()[0]})") from error
