"""Clocks read the devices that compute: proven with faked CUDA events."""

import pytest
import torch

from dropformer.eval.cost.timing import Clock


class FakeCuda:
    """Every device has a stream with a time of its own; events note that time."""

    def __init__(self, monkeypatch):
        self.times = {0: 100.0, 1: 7.0}  # seconds
        self.waited = []
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self, stream):
                self.stream, self.at = stream, fake.times[stream]

            def synchronize(self):
                fake.waited.append(self.stream)

            def elapsed_time(self, other):
                assert self.stream == other.stream, "events of two devices"
                return 1000 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device.index)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.waited.append(device.index))


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_events_are_recorded_on_the_models_device_and_not_on_the_current_one(cuda):
    clock = Clock([torch.device("cuda:1")])
    begin = clock.now()
    cuda.times[1] += 2.5
    cuda.times[0] += 60  # another device, the current one
    assert clock.seconds(begin, clock.now()) == pytest.approx(2.5)


def test_timed_waits_for_the_device_before_and_after(cuda):
    clock = Clock([torch.device("cuda:1")])
    result, took = clock.timed(lambda: cuda.times.__setitem__(1, 8.25) or "done")
    assert (result, took.wall) == ("done", pytest.approx(1.25))
    assert cuda.waited[0] == cuda.waited[-2] == 1


def test_on_several_devices_all_are_waited_for_and_the_hosts_clock_is_read(cuda, monkeypatch):
    moments = iter([10.0, 14.0])
    monkeypatch.setattr("dropformer.eval.cost.timing.time.perf_counter", lambda: next(moments))
    clock = Clock([torch.device("cuda:0"), torch.device("cuda:1")])
    assert clock.seconds(clock.now(), clock.now()) == 4.0
    assert cuda.waited == [0, 1, 0, 1]


def test_without_a_gpu_the_hosts_clock_is_read():
    clock = Clock()
    assert 0 <= clock.seconds(clock.now(), clock.now()) < 1
