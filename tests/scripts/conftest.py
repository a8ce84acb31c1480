import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Where Python looks for modules when it is given a script of either folder.
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "study")]
