"""The protocol by which a set is published, as a small machine: every order of every step, with a kill at each of them.

One shard stands for all. An actor is one of the programs as its author would tell it: a worker builds and publishes the
shard, `finalize` writes the manifest, `repair` rebuilds what it found damaged, `overwrite` deletes another plan's set
and plans its own. Each step below is one operation of `preprocessing.sharding` on the disk; between any two of them any
other actor may take steps, or this one be killed (its lock is free then). All states that can be reached are visited.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest

DAMAGED = ("damaged", 0)
"""Bytes that nobody wrote."""


@dataclass(frozen=True)
class Disk:
    """What lies in the folder. Bytes are named by (plan, kind of machine)."""

    plan: str | None
    tar: tuple | None = None
    sidecar: tuple | None = None
    """(plan, bytes it describes)"""
    manifest: tuple | None = None
    """(plan, bytes it lists)"""
    lock: int | None = None


@dataclass(frozen=True)
class Actor:
    """A program under way: the programs it runs one after the other, and its next step."""

    plan: str
    machine: int
    programs: tuple
    at: str = "start"
    seen: tuple | None = None
    tries: int = 0


def whole(disk: Disk) -> bool:
    """A published set that any reader takes."""
    manifest = disk.manifest
    return manifest is not None and disk.plan == manifest[0] and disk.tar == manifest[1] and disk.sidecar == manifest


@dataclass(frozen=True)
class Rules:
    """What the programs do; a rule that is left out must be seen to matter."""

    locks: bool = True
    check_plan: bool = True
    look_again: bool = True
    """Repair looks once more, under the lock, whether a shard is still damaged."""


class Machine:
    """All that can happen between some actors on one disk."""

    def __init__(self, disk: Disk, actors: tuple, rules: Rules):
        self.start, self.rules = (disk, actors), rules

    def step(self, number: int, disk: Disk, me: Actor) -> tuple[Disk, Actor] | None:
        """The state after this actor's next step; None where it has to wait for the lock."""
        if (me.at == "start" and me.programs[0] in ("overwrite", "finalize", "take", "restore")) or me.at == "publish":
            if self.rules.locks and disk.lock is not None:
                return None
            return replace(disk, lock=number), replace(me, at="check")
        return getattr(self, f"_{me.programs[0]}")(disk, me)

    def _to(self, disk: Disk, me: Actor, at: str, **changes) -> tuple[Disk, Actor]:
        return disk, replace(me, at=at, **changes)

    def _done(self, disk: Disk, me: Actor) -> tuple[Disk, Actor]:
        """The next program; the lock, if it was held, is free."""
        return self._free(disk, me), replace(me, programs=me.programs[1:], at="start", tries=0)

    def _refused(self, disk: Disk, me: Actor) -> tuple[Disk, Actor]:
        return self._free(disk, me), replace(me, programs=(), at="refused")

    def _free(self, disk: Disk, me: Actor) -> Disk:
        return replace(disk, lock=None) if me.at not in ("start", "verify") else disk

    def _other_plan(self, disk: Disk, me: Actor) -> bool:
        return self.rules.check_plan and disk.plan != me.plan

    def _overwrite(self, disk: Disk, me: Actor):
        match me.at:
            case "check":
                return self._done(disk, me) if disk.plan == me.plan else self._to(disk, me, "manifest")
            case "manifest":
                return self._to(replace(disk, manifest=None), me, "tar")
            case "tar":
                return self._to(replace(disk, tar=None), me, "sidecar")
            case "sidecar":
                return self._to(replace(disk, sidecar=None), me, "plan")
            case "plan":
                return self._to(replace(disk, plan=None), me, "create")
            case "create":
                return self._done(replace(disk, plan=me.plan), me)

    def _work(self, disk: Disk, me: Actor):
        mine = (me.plan, me.machine)
        finished = disk.sidecar is not None and disk.sidecar[0] == me.plan and disk.tar is not None
        match me.at:
            case "start":
                if finished:
                    return self._done(disk, me)
                return self._refused(disk, me) if self._other_plan(disk, me) else self._to(disk, me, "publish")
            case "check":
                return self._refused(disk, me) if self._other_plan(disk, me) else self._to(disk, me, "look")
            case "look":
                return self._to(disk, me, "withdraw" if disk.sidecar and not finished else "link")
            case "withdraw":
                return self._to(replace(disk, sidecar=None), me, "link")
            case "link":
                if disk.tar is None:
                    return self._to(replace(disk, tar=mine), me, "describe", seen=("alone",))
                replaced = disk.sidecar is None and disk.tar != mine
                return self._to(disk, me, "replace" if replaced else "describe", seen=None)
            case "replace":
                return self._to(replace(disk, tar=mine), me, "describe")
            case "describe":
                if disk.sidecar is None:
                    disk = replace(disk, sidecar=(me.plan, mine))
                    if me.seen == ("alone",):
                        return self._done(disk, me)
                return self._to(disk, me, "read")
            case "read":
                return self._to(disk, me, "compare", seen=disk.sidecar)
            case "compare":
                if me.seen is not None and disk.tar == me.seen[1]:
                    return self._done(disk, me)
                return self._to(disk, me, "undescribe")
            case "undescribe":
                disk = replace(disk, sidecar=None)
                if me.tries == 2:
                    return self._refused(disk, me)
                return self._to(disk, me, "describe", seen=None, tries=me.tries + 1)

    def _finalize(self, disk: Disk, me: Actor):
        match me.at:
            case "check":
                another = disk.manifest is not None and disk.manifest[0] != me.plan
                refused = self._other_plan(disk, me) or (self.rules.check_plan and another)
                return self._refused(disk, me) if refused else self._to(disk, me, "standing")
            case "standing":
                stands = disk.manifest is not None and disk.tar is not None and disk.sidecar == disk.manifest
                return self._done(disk, me) if stands else self._to(disk, me, "sidecars")
            case "sidecars":
                missing = disk.sidecar is None or disk.sidecar[0] != me.plan or disk.tar is None
                return self._refused(disk, me) if missing else self._to(disk, me, "tables")
            case "tables":
                return self._to(replace(disk, manifest=None), me, "list")
            case "list":
                if disk.sidecar is None:
                    return self._refused(disk, me)
                return self._done(replace(disk, manifest=disk.sidecar), me)

    def _verify(self, disk: Disk, me: Actor):
        """Without the lock: what it saw may be mended when repair begins."""
        return self._refused(disk, replace(me, at="verify")) if whole(disk) else self._done(disk, me)

    def _take(self, disk: Disk, me: Actor):
        match me.at:
            case "check":
                another = disk.manifest is not None and disk.manifest[0] != me.plan
                return self._refused(disk, me) if self._other_plan(disk, me) or another else self._to(disk, me, "away")
            case "away":
                sound = disk.sidecar is not None and disk.sidecar == (me.plan, disk.tar)
                if sound and self.rules.look_again:
                    return self._done(disk, me)
                return self._done(replace(disk, sidecar=None), replace(me, seen=disk.sidecar))

    def _restore(self, disk: Disk, me: Actor):
        """The pictures are gone: the sidecar that was taken goes back."""
        if self._other_plan(disk, me):
            return self._refused(disk, me)
        return self._done(replace(disk, sidecar=disk.sidecar or me.seen), me)

    def states(self) -> Iterator[tuple]:
        """(state before, number of the actor, state after) of every step that can be taken."""
        todo, known = [self.start], {self.start}
        while todo:
            disk, actors = todo.pop()
            for number, actor in enumerate(actors):
                if not actor.programs:
                    continue
                killed = replace(disk, lock=None) if disk.lock == number else disk, replace(actor, programs=(), at="")
                for after in (self.step(number, disk, actor), killed):
                    if after is None:
                        continue
                    state = (after[0], (*actors[:number], after[1], *actors[number + 1 :]))
                    yield (disk, actors), number, state
                    if state not in known:
                        known.add(state)
                        todo.append(state)


def losses(machine: Machine) -> list[tuple]:
    """Steps by which a whole published set stops to be one, other than those of who was told to overwrite it."""
    found = []
    for (disk, actors), number, (after, _) in machine.states():
        program = actors[number].programs[0]
        told = program == "overwrite" and actors[number].plan != disk.plan
        if whole(disk) and not told and (not whole(after) or after.manifest != disk.manifest):
            found.append((actors[number], disk, after))
        listed = after.manifest is not None and after.manifest != disk.manifest
        if listed and after.tar not in (after.manifest[1], DAMAGED):
            found.append((actors[number], disk, after))
    return found


def ends_whole(disk: Disk, plan: str) -> bool:
    """Whether one who is alone brings the folder to a whole set of this plan, from wherever the others left it."""
    machine = Machine(disk, (Actor(plan, 9, ("overwrite", "verify", "take", "work", "finalize")),), Rules())
    disk, (actor,) = machine.start
    while actor.programs:
        after = machine.step(0, disk, actor)
        assert after is not None, "it waits for a lock that nobody holds"
        disk, actor = after
    return whole(disk) and disk.plan == plan


A, A2, B = ("A", 1), ("A", 2), ("B", 1)
WHOLE = Disk("A", A, ("A", A), ("A", A))
STARTS = {
    "planned": Disk("A"),
    "unfinished": Disk("A", A, ("A", A)),
    "orphan": Disk("A", A),
    "whole": WHOLE,
    "damaged tar": replace(WHOLE, tar=DAMAGED),
    "lost tar": replace(WHOLE, tar=None),
    "lost sidecar": replace(WHOLE, sidecar=None),
    "lost manifest": replace(WHOLE, manifest=None),
}
JOB, REPAIR, FAILING = ("work", "finalize"), ("verify", "take", "work", "finalize"), ("verify", "take", "restore")
USER = ("overwrite", "work", "finalize")
ACTORS = {
    "two workers": (Actor("A", 1, JOB), Actor("A", 2, JOB)),
    "worker and repair": (Actor("A", 1, JOB), Actor("A", 2, REPAIR)),
    "two repairs": (Actor("A", 1, REPAIR), Actor("A", 2, REPAIR)),
    "repair and failing repair": (Actor("A", 1, REPAIR), Actor("A", 2, FAILING)),
    "straggler and overwrite": (Actor("A", 1, JOB), Actor("B", 1, USER)),
    "straggler, repair and overwrite": (Actor("A", 1, JOB), Actor("A", 2, REPAIR), Actor("B", 1, USER)),
    "worker, straggler and repair": (Actor("A", 1, JOB), Actor("A", 2, JOB), Actor("A", 3, REPAIR)),
    "two who overwrite": (Actor("A", 1, USER), Actor("B", 1, USER)),
}


@pytest.mark.parametrize("actors", ACTORS.values(), ids=list(ACTORS))
def test_no_order_of_steps_and_kills_loses_a_published_set(actors):
    for name, disk in STARTS.items():
        assert not losses(Machine(disk, actors, Rules())), name


@pytest.mark.parametrize("actors", ACTORS.values(), ids=list(ACTORS))
def test_wherever_all_are_killed_one_more_run_ends_with_a_whole_set(actors):
    for disk in STARTS.values():
        left = {after for _, _, (after, _) in Machine(disk, actors, Rules()).states()}
        for each, plan in product(left, "AB"):
            assert ends_whole(replace(each, lock=None), plan), each


def test_without_locks_workers_of_one_plan_whose_bytes_are_equal_and_one_finalize_lose_nothing():
    actors = (Actor("A", 1, ("work",)), Actor("A", 1, ("work",)), Actor("A", 1, JOB))
    for name in ("planned", "unfinished", "orphan", "whole"):
        assert not losses(Machine(STARTS[name], actors, Rules(locks=False))), name


@pytest.mark.parametrize(
    ("actors", "start", "rules"),
    [
        ("straggler and overwrite", "planned", Rules(check_plan=False)),
        ("straggler and overwrite", "planned", Rules(locks=False)),
        ("two workers", "planned", Rules(locks=False)),
        ("two repairs", "damaged tar", Rules(look_again=False)),
    ],
    ids=["plan not compared", "no locks", "no locks, two kinds of machine", "repair does not look again"],
)
def test_the_model_finds_what_is_lost_without_a_rule(actors, start, rules):
    assert losses(Machine(STARTS[start], ACTORS[actors], rules))
