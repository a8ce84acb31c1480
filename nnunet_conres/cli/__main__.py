"""`python -m nnunet_conres.cli`, where the command is not on the path."""

import sys

from nnunet_conres.cli import main

sys.exit(main())
