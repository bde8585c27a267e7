"""Free memory as made-up machines, containers and jobs would say it."""

import pytest

from swin_scale.host_memory import free_memory


def lay_out(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_of_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return free_memory(root / "proc", root / "groups")


def test_the_kernels_word_where_nothing_limits(tmp_path):
    assert lay_out(tmp_path, proc__meminfo="MemTotal: 9 kB\nMemAvailable:     1000 kB\n") == 1_024_000
    assert free_memory(tmp_path / "nothing", tmp_path / "nothing") is None


@pytest.mark.parametrize("limited", ["groups__job", "groups__job__step"])
def test_the_tightest_group_counts_with_its_cached_files(tmp_path, limited):
    found = lay_out(
        tmp_path,
        proc__meminfo="MemAvailable: 1000 kB\n",
        proc__self__cgroup="0::/job/step\n",
        **{
            "groups__job__memory_of_max": "max\n",
            "groups__job__step__memory_of_max": "max\n",
            f"{limited}__memory_of_max": "300000\n",
            f"{limited}__memory_of_current": "250000\n",
            f"{limited}__memory_of_stat": "anon 5\ninactive_file 20000\n",
        },
    )
    assert found == 70_000


def test_the_first_version_of_control_groups(tmp_path):
    group = "groups__memory__slurm__job_7"
    found = lay_out(
        tmp_path,
        proc__meminfo="MemAvailable: 1000 kB\n",
        proc__self__cgroup="4:memory:/slurm/job_7\n2:cpu,cpuacct:/slurm/job_7\n0::/x\n",
        **{
            f"{group}__memory_of_limit_in_bytes": "5000\n",
            f"{group}__memory_of_usage_in_bytes": "6000\n",
        },
    )
    assert found == 0


def test_this_machine_has_some():
    assert free_memory() > 1 << 20
