"""Which lives of a run are followed by another: every end that a life can have, without a scheduler."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sat import lives


@dataclass
class Job:
    """One that begins and ends lives as slurm/train.sh does."""

    run: Path
    id: str = "17"
    most: int = 100
    said: list[str] = field(default_factory=list)

    def live(self, launched: int, state: str = "", saved: int = 0, asked: bool = False, stop: str | None = None) -> int:
        """A life that writes `state` to status.json ("": nothing), commits step `saved`; what comes of it."""
        lives.begin(self.run, self.id, self.most)
        if state:
            (self.run / "status.json").write_text(json.dumps({"state": state}))
        if saved:
            (self.run / f"checkpoints/step-{saved:08d}").mkdir(parents=True, exist_ok=True)
            (self.run / f"checkpoints/step-{saved:08d}/COMMIT.json").write_text("{}")
        if stop is not None:
            (self.run / "STOP").write_text(stop)
        status, words = lives.end(self.run, self.id, launched, asked, self.most)
        self.said.append(words)
        return status


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "run")


@pytest.mark.parametrize(
    ("life", "verdict"),
    [
        ({"launched": 0, "state": "finished", "saved": 9}, 0),
        ({"launched": 0, "state": "stopped", "saved": 4}, 75),
        ({"launched": 75, "state": "stopped", "asked": True}, 75),
        ({"launched": 0, "state": "stopped", "saved": 4, "asked": True, "stop": "17\n"}, 75),
        ({"launched": 0, "state": "stopped", "saved": 4, "stop": ""}, 0),
        ({"launched": 0, "state": "stopped", "saved": 4, "asked": True, "stop": ""}, 0),
        ({"launched": 1, "state": "failed", "saved": 4}, 1),
        ({"launched": 1}, 1),
        ({"launched": 2}, 2),
        ({"launched": 75, "state": "failed", "saved": 4}, 75),
        ({"launched": 137, "state": "running", "saved": 4}, 75),
        ({"launched": 137}, 75),
    ],
)
def test_a_life_is_followed_by_another_unless_it_finished_failed_or_a_person_stopped_it(job, life, verdict):
    assert job.live(**life) == verdict, job.said


def test_the_status_of_an_earlier_life_is_not_taken_for_this_ones(job):
    assert job.live(0, "stopped", saved=4) == 75
    assert job.live(137) == 75
    assert lives.lives(job.run)[-1].end == ""
    assert job.live(1) == 1


def test_two_deaths_without_a_newer_checkpoint_are_a_crash_loop(job):
    assert job.live(137, "running", saved=4) == 75  # began with nothing
    assert job.live(137, "running") == 75
    assert job.live(137, "running") == 137
    assert "died 2 times in a row without a checkpoint newer than step 4" in job.said[-1]
    with pytest.raises(ValueError, match="died 2 times in a row"):
        job.live(0, "finished")
    assert Job(job.run, "18").live(0, "finished", saved=9) == 0  # a new job is a person's decision


def test_deaths_with_progress_or_a_stop_between_them_are_no_crash_loop(job):
    for saved in range(1, 6):
        assert job.live(137, "running", saved=saved) == 75
    assert job.live(137, "running") == 75
    assert job.live(0, "stopped", asked=True) == 75
    assert job.live(137, "running") == 75


def test_a_life_that_slurm_lost_without_a_word_counts_as_a_death(job):
    for _ in range(2):
        lives.begin(job.run, job.id, job.most)  # and its node is gone
    with pytest.raises(ValueError, match="died 2 times"):
        lives.begin(job.run, job.id, job.most)


def test_restarts_are_bounded(job):
    job.most = 2
    assert [job.live(0, "stopped", saved=step) for step in (1, 2, 3)] == [75, 75, 1]
    assert "queued again 2 times, as often as MAX_RESTARTS allows" in job.said[-1]
    with pytest.raises(ValueError, match="MAX_RESTARTS"):
        job.live(0, "stopped", saved=4)


def test_a_line_that_a_full_disk_cut_off_is_passed_over(job):
    job.live(0, "stopped", saved=4)
    with open(job.run / lives.LIVES, "a") as file:
        file.write('{"job": "17", "beg\n')
    assert job.live(0, "finished", saved=9) == 0
