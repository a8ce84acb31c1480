"""ConResNet, V-Net and 3D U-Net for nnU-Net v2, as trainers that nnU-Net finds by itself.

Importing this package imports nothing heavy, so `nnunet-conres --help` and `info` respond at once. The networks and the
functions named below are imported on first use.
"""

from typing import Any

from nnunet_conres.families import FAMILIES, load

__version__ = "0.2.0"

_HOMES = {path.rpartition(".")[2]: path for family in FAMILIES for path in family.networks} | {
    "from_authors_state_dict": "nnunet_conres.architectures.authors_weights.from_authors_state_dict",
    "inter_slice_residual": "nnunet_conres.residuals.inter_slice_residual",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = load(_HOMES[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
