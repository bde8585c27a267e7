"""Who is to blame, in every case that a cluster has shown, from what the ranks' watchdogs say."""

import pytest

from launcher.verdict import Sign, Verdict, died, judge, went_on


def sign(rank, section="forward", step=8, count=100, **fields):
    host = fields.pop("host", f"n{1 + rank // 2}")
    return Sign(rank=rank, host=host, pid=1000 + rank, section=section, step=step, count=count, quiet_s=31.4, **fields)


def blamed(*signs, world=None, seen=()):
    return judge({one.rank: one for one in signs}, {one.rank: one for one in seen}, world or len(signs))


def test_the_rank_that_others_wait_for_is_the_one_furthest_behind():
    verdict = blamed(*(sign(rank, "forward", 9, 104) for rank in (0, 2, 3)), sign(1, "optimizer", 8, 103))
    assert verdict.ranks == (1,) and verdict.host == "n1" and verdict.section == "optimizer"
    assert verdict.text == (
        "rank 1 on n1 hung for 31 s in section optimizer after step 8; ranks 0, 2, 3 waited in section forward after "
        "step 9"
    )


def test_a_checkpoint_of_an_earlier_step_is_further_behind_than_any_count():
    assert blamed(sign(0, step=9, count=5), sign(1, step=8, count=500)).ranks == (1,)


@pytest.mark.parametrize("letter", ["T", "t"])
def test_a_stopped_process_is_named_though_it_is_ahead(letter):
    verdict = blamed(sign(0, count=99), sign(1, count=100, state=letter))
    assert verdict.ranks == (1,) and "stopped (SIGSTOP, or a debugger)" in verdict.text


def test_a_stopped_loader_worker_names_its_rank_and_the_section_data():
    verdict = blamed(sign(0, "data", stopped=(77,)), sign(1, "data"))
    assert verdict.ranks == (0,) and verdict.section == "data"
    assert "waiting for a loader worker that is stopped (process 77)" in verdict.text


def test_a_stopped_child_means_nothing_outside_of_data():
    assert blamed(sign(0, "forward", 9, 110, stopped=(77,)), sign(1)).ranks == (1,)


def test_of_those_equally_far_the_one_in_no_collective_is_to_blame():
    assert blamed(sign(0, waiting=True), sign(1), sign(2, waiting=True)).ranks == (1,)


def test_a_section_may_say_that_a_rank_waits():
    assert blamed(sign(0, "all_to_all"), sign(1, "forward"), sign(2, "sync")).ranks == (1,)


def test_most_wait_where_a_few_have_passed_by():
    """One rank left out a collective, and waits in the next one."""
    signs = [*(sign(rank, waiting=True) for rank in range(3)), sign(3, step=8, count=103, waiting=True)]
    assert blamed(*signs).ranks == (3,)


def test_where_all_wait_nobody_is_blamed_and_all_end():
    verdict = blamed(*(sign(rank, "all_to_all", waiting=True) for rank in range(4)))
    assert verdict.ranks == () and verdict.fatal and not verdict.reachable
    assert "all 4 ranks hung for 31 s in section all_to_all after step 8" in verdict.text
    assert b'"rank"' not in verdict.dump()


def test_a_silent_machine_is_named_with_all_its_ranks():
    here, there = [sign(0), sign(1)], [sign(2, "backward", 7), sign(3, "backward", 7)]
    verdict = blamed(*here, world=4, seen=[*here, *there])
    assert verdict.ranks == (2, 3) and verdict.host == "n2" and not verdict.reachable
    assert verdict.text == (
        "ranks 2, 3 on n2 gave no sign of life for 31 s, nor did their watchdogs, last seen in section backward after "
        "step 7: the machine is frozen, or cannot be reached"
    )


def test_a_rank_that_was_never_heard_of_is_named_by_number():
    assert "rank 2 never gave a sign of life" in blamed(sign(0), sign(1), world=3).text


def test_who_said_goodbye_is_not_missed():
    assert blamed(sign(1, "close"), world=2, seen=[sign(0, "close", ended=True)]).ranks == (1,)


def test_a_killed_rank_comes_before_all_others():
    verdict = blamed(sign(0, state="T"), sign(1, None, state=""), world=9)
    assert verdict == died(sign(1, None, state=""))
    assert verdict.ranks == (1,) and "rank 1 on n1 was killed" in verdict.text and "between sections" in verdict.text


def test_one_rank_alone_is_to_blame():
    assert blamed(sign(0, "checkpoint", state="D")).text.endswith("in uninterruptible sleep, see wchan")


def test_when_all_have_ended_nothing_is_to_be_done():
    assert not blamed(sign(0, ended=True), sign(1, ended=True)).fatal


@pytest.mark.parametrize(
    "verdict", [died(sign(1)), went_on(sign(0)), blamed(sign(0), sign(1, count=99)), blamed(sign(0), world=3)]
)
def test_verdicts_and_signs_are_read_as_they_were_written(verdict):
    assert Verdict.parse(verdict.dump()) == verdict
    whole = verdict.dump()
    assert Verdict.parse(whole[: len(whole) // 2]) is None and Verdict.parse(b"") is None
    one = sign(3, None, stopped=(5, 6))
    assert Sign.parse(one.dump()) == one and Sign.parse(one.dump()[:-3]) is None and Sign.parse(b"[]") is None
