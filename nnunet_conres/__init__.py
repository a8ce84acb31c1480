"""ConResNet, V-Net and 3D U-Net for nnU-Net v2, as trainers that nnU-Net finds by itself.

Importing this package imports nothing else, so that `nnunet-conres --help` and `info` answer at once; the names below
are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_conres.architectures.authors_weights import from_authors_state_dict
    from nnunet_conres.architectures.conresnet import ConResNet
    from nnunet_conres.architectures.conresnet_paper import ConResNetPaper
    from nnunet_conres.architectures.residual_map_unet import ResidualMapUNet
    from nnunet_conres.architectures.unet3d import UNet3D
    from nnunet_conres.architectures.vnet import VNet
    from nnunet_conres.residuals import inter_slice_residual

__version__ = "0.1.0"

__all__ = [
    "ConResNet",
    "ConResNetPaper",
    "ResidualMapUNet",
    "UNet3D",
    "VNet",
    "__version__",
    "from_authors_state_dict",
    "inter_slice_residual",
]

_HOMES = {
    "ConResNet": "nnunet_conres.architectures.conresnet",
    "ConResNetPaper": "nnunet_conres.architectures.conresnet_paper",
    "ResidualMapUNet": "nnunet_conres.architectures.residual_map_unet",
    "UNet3D": "nnunet_conres.architectures.unet3d",
    "VNet": "nnunet_conres.architectures.vnet",
    "from_authors_state_dict": "nnunet_conres.architectures.authors_weights",
    "inter_slice_residual": "nnunet_conres.residuals",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
