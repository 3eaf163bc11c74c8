"""How many cores a process may use: by what it is pinned to and what its control groups grant."""

import os

import pytest

from wsi_idc.cores import _quotas, cores


@pytest.mark.parametrize(
    ("files", "own", "quotas"),
    [
        ({}, None, []),
        ({"cpu.max": "max 100000\n"}, "0::/\n", []),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", [2]),
        ({"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "50000 100000\n"}, "0::/a/b\n", [1, 4]),
        ({"other/cpu.max": "100000 100000\n"}, "0::/a/b\n", []),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "5:cpu:/a\n", [3]),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "5:cpu:/a\n0::/\n", []),
        ({"cpu.max": "much\n"}, "0::/../..\n", []),
    ],
)
def test_control_groups_grant_whole_cores(tmp_path, files, own, quotas):
    root = tmp_path / "groups"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert sorted(_quotas(root, tmp_path / "own")) == quotas


def test_there_is_a_core_and_no_more_than_this_process_is_pinned_to():
    assert 1 <= cores() <= len(os.sched_getaffinity(0))
