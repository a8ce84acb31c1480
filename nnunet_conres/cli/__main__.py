"""Run the command with `python -m nnunet_conres.cli` if it is not on the path."""

import sys

from nnunet_conres.cli import main

sys.exit(main())
