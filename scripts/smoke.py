"""Check an installed nnunet-conres, without a checkout: python scripts/smoke.py

Checks that the commands start, nnU-Net finds a trainer, synthetic cases become a data set, and networks compute outputs
and finite gradients. Takes about a minute on a CPU; writes to a temporary folder only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Import the installed package, not one in this script's folder.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]


def command(*arguments: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "nnunet_conres.cli", *arguments],
        cwd=tempfile.gettempdir(),
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        sys.exit(f"nnunet-conres {' '.join(arguments)} ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return run.stdout


def check_discovery() -> None:
    info = json.loads(command("info", "--json"))
    assert info["ok"], info
    import nnunetv2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    trainer = recursive_find_trainer_class_by_name("nnUNetTrainerConResNet_5epochs")
    assert issubclass(trainer, nnUNetTrainer), trainer
    print("nnU-Net", Path(nnunetv2.__file__).parent, "finds", trainer.__name__)


def check_data(folder: Path) -> None:
    command("phantom", "-o", str(folder / "brats"), "-n", "2", "--held-out", "0", "--shape", "24", "24", "16")
    converted = command("brats-convert", "-i", str(folder / "brats"), "-d", "501", nnUNet_raw=str(folder))
    assert "training cases: 2" in converted, converted
    print("brats-convert: 2 cases")


def check_networks() -> None:
    import torch

    from nnunet_conres import ConResNetPaper, UNet3D, VNet, inter_slice_residual

    image = torch.randn(1, 4, 16, 32, 32)
    assert inter_slice_residual(image).shape == image.shape
    for network in (ConResNetPaper(4, 3), VNet.paper(4, 3), UNet3D.paper(4, 3)):
        output = network(image)
        output = output[0] if isinstance(output, (list, tuple)) else output
        assert output.shape == (1, 3, 16, 32, 32), output.shape
        output.square().mean().backward()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in network.parameters())
        print(type(network).__name__, "gives outputs and finite gradients")


def main() -> None:
    check_discovery()
    with tempfile.TemporaryDirectory() as folder:
        check_data(Path(folder))
    check_networks()
    import torch

    import nnunet_conres

    print(f"ok: nnunet-conres {nnunet_conres.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
