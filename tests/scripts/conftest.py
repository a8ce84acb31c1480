import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Python puts a script's folder on the module path; the tests need both folders.
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "study")]
