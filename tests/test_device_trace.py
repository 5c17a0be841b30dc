import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from pallas_kernels.device_trace import Event, busy_seconds, by_name, events_of, is_kept, record

PROFILE = """
planes { name: "/host:CPU" lines { name: "Stream of consciousness"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "cuGraphLaunch" } } }
planes { name: "/device:GPU:0"
  lines { name: "Stream #1" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000000 duration_ps: 2000000 }
    events { metadata_id: 2 offset_ps: 1000000 duration_ps: 3000000 }
    events { metadata_id: 1 offset_ps: 9000000 duration_ps: 4000000 } }
  lines { name: "Stream #2" timestamp_ns: 2000
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 1000000 } }
  lines { name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 7000000 } }
  event_metadata { key: 1 value { id: 1 name: "fp8_matmul" } }
  event_metadata { key: 2 value { id: 2 name: "fusion" } } }
"""


def test_events_are_those_of_the_streams_by_their_start():
    events = events_of(ProfileData.from_serialized_xspace(
        ProfileData.text_proto_to_serialized_xspace(PROFILE)
    ))  # fmt: skip
    assert [event.name for event in events] == ["fusion", "fp8_matmul", "fusion", "fp8_matmul"]
    starts = [event.start - events[0].start for event in events]
    assert starts == pytest.approx([0, 4e-6, 5e-6, 8e-6], abs=1e-9)
    assert [event.duration for event in events] == pytest.approx([3e-6, 2e-6, 1e-6, 4e-6])
    # 2 to 5, 6 to 8 with 7 to 8 inside, 10 to 14 us.
    assert busy_seconds(events) == pytest.approx(9e-6)
    matmul, fusion = by_name(events)
    assert (matmul.name, matmul.count, fusion.count) == ("fp8_matmul", 2, 2)
    assert (matmul.total, matmul.median) == pytest.approx((6e-6, 3e-6))
    assert (fusion.total, fusion.median) == pytest.approx((4e-6, 2e-6))
    assert "2 x      3.00 us  fp8_matmul" in str(matmul)


def test_events_that_overlap_are_counted_once():
    assert busy_seconds([Event("a", 0, 4), Event("b", 1, 2), Event("c", 3, 3)]) == 6
    assert busy_seconds([]) == 0


def test_a_cpu_keeps_no_record_of_a_device():
    ran = []
    assert record(lambda: ran.append(1) or jnp.arange(8) * 2) == []
    assert ran == [1]
    assert not is_kept()
