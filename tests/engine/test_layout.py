"""Every launcher's environment is one row: what it means, or why it is refused."""

import pytest

from swin_scale.engine.layout import Layout, expand_nodelist, read_env
from swin_scale.errors import UserError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
# Recorded on a real cluster: 2 nodes x 2 tasks, seen by the last task; then by the batch shell of the same job.
SLURM_TASK = {
    "SLURM_JOB_ID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
SLURM_BATCH = {
    "SLURM_JOB_ID": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "n[1-2]",
}
TASK_LAYOUT = Layout(rank=3, world=4, local_rank=1, local_world=2, master_addr="n1", master_port=12003, source="slurm")


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Layout()),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, Layout()),
        (TORCHRUN, Layout(rank=3, world=4, local_rank=1, local_world=2, master_addr="n1", master_port=29500,
                          source="torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Layout(source="torchrun")),
        (SLURM_TASK, TASK_LAYOUT),
        # torchrun, or a wrapper script, inside srun: the inner variables are the finer ones.
        ({**SLURM_TASK, **TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"},
         Layout(rank=3, world=4, local_rank=1, local_world=2, master_addr="n1", master_port=29500, agent_store=True,
                source="torchrun")),
        ({**SLURM_TASK, **without(TORCHRUN, "LOCAL_WORLD_SIZE")},
         Layout(rank=3, world=4, local_rank=1, local_world=2, master_addr="n1", master_port=29500, source="torchrun")),
        # What a batch script exported is the same for every task.
        ({**SLURM_TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20003", "WORLD_SIZE": "4"},
         Layout(rank=3, world=4, local_rank=1, local_world=2, master_addr="10.0.0.1", master_port=20003,
                source="slurm")),
        # A step on part of the job.
        ({**SLURM_TASK, "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
          "SLURM_STEP_NODELIST": "n[1,3]"}, TASK_LAYOUT),
        (SLURM_BATCH, Layout()),
        ({**SLURM_BATCH, "SLURM_STEP_ID": "4294967290"}, Layout()),  # interactive step of salloc
    ],
)  # fmt: skip
def test_layout(environ, expected):
    assert read_env(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without(TORCHRUN, "LOCAL_RANK"), "but not LOCAL_RANK"),
        (without(TORCHRUN, "MASTER_ADDR", "MASTER_PORT"), "but not MASTER_ADDR, MASTER_PORT"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "but not RANK, LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "but not RANK, WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "contradict"),
        ({**TORCHRUN, "RANK": "0"}, "contradict"),  # local rank 1 of rank 0
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1'"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({**SLURM_TASK, "WORLD_SIZE": "2"}, "WORLD_SIZE=2 contradicts this Slurm step"),
        ({**SLURM_TASK, "SLURM_TASKS_PER_NODE": "2(x3)"}, "adds up to 6 tasks, but this step has 4"),
        ({**SLURM_TASK, "SLURM_TASKS_PER_NODE": "two"}, "expected counts"),
        ({**SLURM_TASK, "SLURM_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}, "3,1 places tasks unevenly"),
        ({**SLURM_TASK, "SLURM_NODEID": "2"}, "SLURM_NODEID is 2"),
        (without(SLURM_TASK, "SLURM_PROCID"), "SLURM_PROCID is not set"),
        (without(SLURM_TASK, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "set MASTER_ADDR"),
    ],
)
def test_refused(environ, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read_env(environ)


def test_torchruns_restarts_count_where_the_store_lives_on():
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    one_machine = {**TORCHRUN, "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    assert read_env({**one_machine, **agent}).attempt == 2
    assert read_env({**one_machine, **agent, "TORCHELASTIC_USE_AGENT_STORE": "False"}).attempt == 0
    assert read_env({**TORCHRUN, **agent}).attempt == 0


def test_steps_and_generations_of_one_job_meet_on_different_ports():
    ports = {read_env({**SLURM_TASK, "SLURM_STEP_ID": str(step)}).master_port for step in range(5)}
    ports |= {read_env({**SLURM_TASK, "SLURM_RESTART_COUNT": str(restart)}).master_port for restart in (1, 2)}
    assert len(ports) == 7
    assert all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-2,7]", ["n1", "n2", "n7"]),
        ("n[1-2,7],m3", ["n1", "n2", "n7", "m3"]),
        ("gpu-[008-011]", ["gpu-008", "gpu-009", "gpu-010", "gpu-011"]),
        ("r[1-2]n[1-2].site", ["r1n1.site", "r1n2.site", "r2n1.site", "r2n2.site"]),
    ],
)
def test_nodelist(text, hosts):
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-2", "n[2-1]", "n[a-b]", "n]1[", "a,,b", "n[]"])
def test_nodelist_refused(text):
    with pytest.raises(UserError, match="node list"):
        expand_nodelist(text)
