import signal
import sys
from pathlib import Path

_IS_COMMAND = Path(sys.argv[0]).name == "-m" or Path(sys.argv[0]).name.startswith("jepa-")
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the next import is done
    from jepa.parallel.signals import leave

    signal.signal(signal.SIGINT, leave)  # Ctrl-C during the imports of a command prints no traceback
