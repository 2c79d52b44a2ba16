"""Every call of a real process interrupted by a signal before it begins: EINTR, which must change nothing at all.

`strace` answers the first, third, fifth ... call on the files of the folder with EINTR, so that each call is made
twice: once interrupted, once in earnest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.crash.commands import Command
from tests.crash.judge import Truth
from tests.crash.shapes import Shape
from tests.crash.trial import Outcome, Trial

_CALLS = "pread64,preadv,preadv2,pwrite64,pwritev,fsync,fdatasync,ftruncate,fallocate,read,write"
SECONDS = 120


def interrupt(folder: Path, command: Command, shape: Shape) -> Outcome:
    """Run a command so; its outcome counts the calls that were interrupted."""
    trial = Trial(folder, command, shape)
    trial.run()
    new = trial.judge().new
    trial.before.write(folder)
    words = command.words(trial.image, shape)
    log = folder.with_name(f"{folder.name}.strace")
    names = [word for path in [folder, *folder.iterdir()] for word in ("-P", str(path))]
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", log, *names, "-P", str(folder / "undo"), "-e", f"trace={_CALLS}",
         "-e", f"inject={_CALLS}:error=EINTR:when=1+2", sys.executable, "-m", "qcow2bm", *words],
        cwd=Path.cwd(), check=False, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    outcome = Outcome(log.read_text().count("(INJECTED)"))
    log.unlink()
    if done.returncode not in command.status:
        return Outcome(outcome.states, [f"it ended with {done.returncode}: {done.stdout}{done.stderr}"])
    if Truth.of(trial.image, shape.secret) != new:
        outcome.bad.append("the image is not what it is without interruptions")
    return outcome
