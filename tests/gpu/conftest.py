import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(
                    pytest.mark.skip(reason="no CUDA device; `make gpu-check` runs this where there is one")
                )
