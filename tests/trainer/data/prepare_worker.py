"""A process that prepares data, for tests that kill it or run several at once.

prepare_worker.py SETTINGS kill N         counts events (a document read, a file synced, removed or renamed, a folder
                                          made), and kills itself by SIGKILL at the N-th; prints the number of events
prepare_worker.py SETTINGS meet DIR [N]   at its N-th document (default: the first) makes DIR/reading and waits for
                                          DIR/go, all batches before being done; prints the number of documents it read
Both make small batches and go on from many places. With HOST in the environment they are on another machine, as far as
locks can tell, whose death is noticed after LEASE seconds.
"""

import json
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

from trainer.data import cache, status
from trainer.data import source_builder as module
from trainer.data.cache import Conduct
from trainer.data.prepare import prepare_source
from trainer.data.settings import SourceSettings


def kill_at(last: int) -> None:
    status._WRITE_SECONDS = math.inf  # a slow process would have more events than a fast one
    count = 0

    def event() -> None:
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def call(*args, **options):
            event()
            result = function(*args, **options)
            event()
            return result

        return call

    class Documents(module.Documents):
        def __iter__(self):
            for piece in super().__iter__():
                event()
                yield piece

    module.Documents = Documents
    for name in ("fsync", "rename", "replace", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    prepare_source(settings, Conduct(show=False))
    print(count)


def meet(folder: Path, at: int) -> None:
    count = 0

    class Documents(module.Documents):
        def __iter__(self):
            nonlocal count
            for piece in super().__iter__():
                count += 1
                if count == at:
                    (folder / "reading").touch()
                    while not (folder / "go").exists():
                        time.sleep(0.01)
                yield piece

    module.Documents = Documents
    module._read_ahead = lambda batches: batches  # no thread reads while another is in the middle of a batch
    prepare_source(settings, Conduct())
    print(count)


signal.alarm(600)  # nobody waits for it for ever, and a test that fails leaves none behind
module.BATCH_CHARACTERS, module.COMMIT_TOKENS = 400, 500
if "HOST" in os.environ:
    socket.gethostname = lambda: os.environ["HOST"]
    cache.LEASE_SECONDS, cache._BEAT_SECONDS = float(os.environ["LEASE"]), 0.2
fields = json.loads(sys.argv[1])
settings = SourceSettings(**fields | {"split": tuple(fields["split"])})
if sys.argv[2] == "kill":
    kill_at(int(sys.argv[3]))
else:
    meet(Path(sys.argv[3]), int([*sys.argv, "1"][4]))
