import pytest

from tests.disks import small_disks


@pytest.fixture
def small_disk(tmp_path):
    with small_disks(tmp_path) as mount:
        yield mount
