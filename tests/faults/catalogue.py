"""Which faults there are, where they may hit a job, and a choice of N of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.faults import disks, networks, signals
from tests.faults.jobs import LAYOUTS, Pause
from tests.faults.scene import Case, Fault

FAULTS: dict[str, Fault] = signals.FAULTS | disks.FAULTS | networks.FAULTS


@dataclass(frozen=True)
class Place:
    """A call of the product at which a rank waits for a fault.

    Attributes:
        function: "module:Class.function".
        kind: The kind of request among its arguments.
        who: Which ranks come there: "all", "trunk", "wire" (trunk ranks that ask others for experts), "pool" (ranks
            that serve experts) or "first" (rank 0).
        last: The largest number of a call that every layout reaches.
        resumes: Whether only a resumed run comes there.
        in_step: Whether the others wait only for `parallel.timeout_seconds`.
    """

    function: str
    kind: str = ""
    who: str = "all"
    last: int = 1
    resumes: bool = False
    in_step: bool = False


_REQUEST, _SERVE = "pool.wire.host:HostTrunk.request", "pool.service:PoolService._serve_kind"

PLACES = {
    "start of Python": Place(""),
    "start-up": Place("trainer.train.start:rendezvous"),
    "rendezvous": Place("trainer.cluster.liveness:Liveness.exchange_arrivals"),
    "data": Place("trainer.train.start:prepare_for", who="trunk"),
    "schedule": Place("trainer.train.start:agreed_schedule"),
    "process groups": Place("trainer.cluster.process_groups:Job._cross_group"),
    "choice of a checkpoint": Place("trainer.train.start:choose"),
    "reading a checkpoint": Place("trainer.checkpoint.format:damage", resumes=True),
    "engine": Place("trainer.engine.role_engine:RoleEngine.__init__"),
    "metrics": Place("trainer.telemetry.prometheus:MetricsServer.__init__"),
    "loading a checkpoint": Place("trainer.train.start:load_checkpoint", resumes=True),
    "run folder": Place("trainer.telemetry.run_folder:RunFolder.begin", who="first"),
    "forward": Place(_REQUEST, "FORWARD", "wire", 30, in_step=True),
    "serving a forward": Place(_SERVE, "FORWARD", "pool", 30, in_step=True),
    "backward": Place(_REQUEST, "BACKWARD", "wire", 30, in_step=True),
    "serving a backward": Place(_SERVE, "BACKWARD", "pool", 30, in_step=True),
    "micro-batches": Place("trainer.train.trunk_rank:TrunkRank.accumulate", who="trunk", last=10, in_step=True),
    "reduction": Place("trainer.cluster.process_groups:add_up", last=15, in_step=True),
    "optimizer": Place("trainer.engine.role_engine:RoleEngine.step", last=10, in_step=True),
    "evaluation": Place(_REQUEST, "FORWARD_ONLY", "wire", 10, in_step=True),
    "serving an evaluation": Place(_SERVE, "FORWARD_ONLY", "pool", 10, in_step=True),
    "copying for a save": Place("trainer.engine.role_engine:RoleEngine.save", last=5),
    "writing a save": Place("trainer.checkpoint.save:_write", last=5),
    "commit of a save": Place("trainer.checkpoint.save:Saver._commit", who="first", last=4),
    "rotation": Place("trainer.checkpoint.save:Saver._remove", who="first", last=2),
    "last save": Place("trainer.train.ends.ending:Ending.finish_saving"),
    "sample": Place("trainer.train.ends.ending:Ending.finish"),
    "summary": Place("trainer.train.ends.ending:write_summary", who="first"),
    "shutdown": Place("trainer.cluster.process_groups:Job.close"),
}

STEPS = [name for name, place in PLACES.items() if place.in_step]
ANYWHERE = [*PLACES]
NO_PLACE, PREPARING = "before the start", "data preparation"

POISON = {
    "answers": Place("pool.shard:ExpertServer.forward", who="pool", last=20),
    "gradients of tokens": Place("pool.shard:ExpertServer.backward", who="pool", last=20),
}
"""Calls whose results a fault may make NaN."""

PREPARATION = Place("trainer.data.source_builder:SourceBuilder.run", who="first")

ALL_PLACES = PLACES | POISON | {PREPARING: PREPARATION}

SAVING = ["forward", "writing a save", "copying for a save", "commit of a save"]

WHERE: dict[str, list[str]] = {
    "exception": [PREPARING, *(name for name, place in PLACES.items() if place.function)],
    **{name: [*ANYWHERE, PREPARING] for name in ("kill -9", "SIGTERM", "SIGTERM twice", "SIGINT")},
    "all ranks frozen for a while": [*STEPS, "copying for a save", "engine", "last save"],
    "NaN once": [*POISON],
    "NaN from then on": [*POISON],
    **{name: [*PLACES][1:] for name in signals.FAULTS if "clock" in name},
    **{name: [NO_PLACE] for name in disks.FAULTS},
    "disk of run.dir full for a while": SAVING,
    "disk of run.dir full to the end": ["optimizer", "writing a save", "last save"],
    "disk of data.dir full": [PREPARING],
    "disk of temporary files full": ["forward", "sample"],
    "disk of the log full": ["forward", "engine"],
    "checkpoints/ removed": ["forward", "optimizer"],
    "run.dir removed": ["forward"],
    "files of a save cut": ["commit of a save"],
    "metrics.jsonl removed": ["forward", "optimizer"],
    **{name: [*STEPS, "process groups", "copying for a save", "schedule"] for name in networks.FAULTS},
    **{name: STEPS for name, fault in networks.FAULTS.items() if fault.ends(0)},
}
"""Places that suit a fault; all others suit every place."""

WEIGHTS = {
    "kill -9": 60,
    "SIGSTOP": 20,
    "SIGSTOP, SIGCONT in time": 12,
    "SIGSTOP, SIGCONT too late": 3,
    "all ranks frozen for a while": 3,
    "alive but stuck": 8,
    "exception": 14,
    "SIGTERM": 6,
    "SIGUSR1": 3,
    "SIGTERM twice": 6,
    "SIGINT": 3,
    "kill -9 of a launcher": 4,
    "NaN once": 3,
    "link down": 3,
    "link down for a while": 3,
    "packets vanish": 2,
    "connections reset": 2,
    "a node dies": 3,
}
"""How often a fault is chosen once each has been; 0.3 for all others."""


def _ranks(layout: str, who: str) -> list[int]:
    """Return the launcher ranks that come to a place."""
    keys = LAYOUTS[layout]
    trunk, pool = keys["parallel.trunk_ranks"], keys["parallel.pool_ranks"]
    serving = [] if layout == "colocated" else range(trunk, trunk + pool) if pool else range(trunk)
    asking = [] if layout == "colocated" else range(trunk)
    return [*{"all": range(trunk + pool), "first": [0], "trunk": range(trunk), "wire": asking, "pool": serving}[who]]


def _case(fault: str, choose: random.Random, number: int) -> Case:
    """Return a case with this fault in a random layout, at a random place that suits it, on a random rank."""
    while True:
        layout, name = choose.choice([*LAYOUTS]), choose.choice(WHERE.get(fault, ANYWHERE))
        if name == NO_PLACE:
            return Case(number, layout, fault, name, 0, None, resumes="full before the start" not in fault)
        if name == PREPARING:
            pause = Pause("train", PREPARATION.function, then=FAULTS[fault].then)
            return Case(number, layout, fault, name, "train", pause)
        place = ALL_PLACES[name]
        ranks = _ranks(layout, place.who)
        if fault in networks.FAULTS:  # the last rank is the only one of the second node
            ranks = [rank for rank in ranks if rank == len(_ranks(layout, "all")) - 1]
        if ranks:
            break
    rank = choose.choice(ranks)
    pause = Pause(rank, place.function, place.kind, choose.randint(1, place.last), FAULTS[fault].then)
    keys = (("train.max_skipped_steps", 3),) if name in POISON else ()
    return Case(number, layout, fault, name, _victim(fault, rank, choose), pause, place.resumes, keys)


def _victim(fault: str, rank: int, choose: random.Random) -> int | str:
    """Return what the fault hits while `rank` waits."""
    if "launcher" in fault:
        return choose.choice(["train", "launcher"])
    if fault == "SIGSTOP, SIGCONT in time":
        return choose.choice([rank, rank, "train", "launcher"])
    if fault.startswith(("SIGTERM", "SIGUSR1", "SIGINT")):
        return choose.choice([rank, "train"])
    return rank


def choose_cases(count: int, seed: int) -> list[Case]:
    """Return `count` cases, the same for the same seed: first each fault once, then in proportion to `WEIGHTS`."""
    choose = random.Random(seed)
    names = [*FAULTS, *choose.choices([*FAULTS], [WEIGHTS.get(name, 0.3) for name in FAULTS], k=count)]
    return [_case(name, choose, number) for number, name in enumerate(names[:count], 1)]
