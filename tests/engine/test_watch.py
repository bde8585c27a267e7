"""What a rank asks of its watchdog; the rest is in tests/test_hangs.py."""

from swin_scale.config import EngineConfig
from swin_scale.engine import watch
from swin_scale.sections import Sections


def test_the_record_of_collectives_is_asked_for_by_its_one_name(monkeypatch, tmp_path):
    """torch warns of every other name, on every rank."""
    environment = {}
    monkeypatch.setattr(watch.os, "environ", environment)
    with watch.Watch(tmp_path, EngineConfig(), Sections()):
        assert environment == {"TORCH_FR_BUFFER_SIZE": watch.FLIGHTS}
