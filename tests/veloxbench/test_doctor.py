"""What ``veloxbench doctor`` finds unfit, and what it only mentions."""

from veloxbench.records import provenance
from veloxbench.run.doctor import examine


def test_a_battery_is_mentioned_and_stops_nothing(monkeypatch):
    """A laptop off its charger can measure bytes and quality: ``make bench`` goes on, told that timings throttle."""
    monkeypatch.setattr(provenance, "machine_state", lambda: {"load_1min": 0.0, "on_battery": True})
    (power,) = (check for check in examine() if check.name == "power")
    assert power.ok is None
    assert "throttle" in power.found
