import sys
from pathlib import Path

# Where Python looks for modules when it is given the script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))
