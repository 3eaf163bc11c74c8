"""What runs on a GPU, run on the CPU device for everything but its speed; the real thing where there is one."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from wsi_idc.model import gpu
from wsi_idc.model.bundle import SHIPPED, read_bundle
from wsi_idc.model.config import NetworkConfig
from wsi_idc.model.gpu import GpuRuntime
from wsi_idc.model.known import made_tiles
from wsi_idc.model.network import build_network, export_onnx, save_weights
from wsi_idc.model.runtime import load_runtime


def tiles_of(count, size=50):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture
def kind():
    return "idc-2016"


@pytest.fixture
def trained(bundle, kind, monkeypatch):
    """A bundle with a network, as weights and as a graph; on the GPU eight tiles at once."""
    monkeypatch.setattr(gpu, "_MOST_TILES", 8)
    monkeypatch.setattr(gpu, "_LEAST_TILES", 8)
    torch.manual_seed(3)
    config = NetworkConfig(kind=kind, input_px=32, contrast="stretch")
    network = build_network(config).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # As training leaves them: not the identity, and not all near one.
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.3, 3.0)
            module.weight.data.uniform_(0.5, 1.0)
    network.temperature.fill_(0.05)
    save_weights(network, bundle / "model.safetensors")
    export_onnx(network, bundle / "model.onnx")
    fields = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**fields, "network": config.model_dump(mode="json")}))
    return read_bundle(bundle)


@pytest.mark.parametrize("kind", ["idc-2016", "resnet50"])
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 0.002)])
def test_its_probabilities_are_those_of_the_graph(trained, half, tolerance):
    tiles = made_tiles(50)[::2]
    wanted = load_runtime(trained, "float32", 1).predict(tiles)
    found = GpuRuntime(trained, half=half, device="cpu").predict(tiles)
    assert found.dtype == np.float32 and wanted.std() > 0.005
    assert 0 < np.abs(found - wanted).max() < tolerance


def test_results_come_late_in_order_and_cut_to_their_tiles(trained):
    runtime, tiles = GpuRuntime(trained, half=False, device="cpu"), tiles_of(40)
    whole = runtime.predict(tiles)
    starts, stops = (0, 3, 11, 11, 28), (3, 11, 11, 28, 40)
    begun = [runtime.begin(tiles[start:stop]) for start, stop in zip(starts, stops, strict=True)]
    assert len(begun) > runtime.ahead
    results = [each.result() for each in reversed(begun)][::-1]
    assert [len(result) for result in results] == [3, 8, 0, 17, 12]
    assert np.array_equal(np.concatenate(results), whole)
    assert np.array_equal(begun[0].result(), whole[:3])


def test_several_slides_may_be_begun_at_once(trained):
    runtime, tiles = GpuRuntime(trained, half=False, device="cpu"), tiles_of(48)
    whole = runtime.predict(tiles)
    with ThreadPoolExecutor(4) as callers:
        begun = list(callers.map(lambda n: runtime.begin(tiles[n : n + 5]), range(0, 48, 5)))
    assert np.array_equal(np.concatenate([each.result() for each in begun]), whole)


class Device:
    """Streams and events that keep a diary instead of an order: what waits for what, and when the caller does."""

    def __init__(self):
        self.diary, self.count = [], 0

    def named(self, kind):
        self.count += 1
        return f"{kind} {self.count}"

    def Stream(self):  # noqa: N802
        device = self

        class Stream:
            name = device.named("stream")

            def wait_event(self, event):
                device.diary.append((self.name, "waits for", event.name))

        return Stream()

    def Event(self):  # noqa: N802
        device = self

        class Event:
            name = device.named("event")

            def record(self, stream):
                device.diary.append((stream.name, "records", self.name))

            def synchronize(self):
                device.diary.append(("caller", "waits for", self.name))

        return Event()

    def stream(self, stream):
        return torch.cpu.stream(torch.cpu.Stream())

    def synchronize(self):
        self.diary.clear()


def test_nobody_writes_where_another_still_reads_and_only_a_result_waits_for_the_computing(trained, monkeypatch):
    """The order that CUDA is told, since here everything is in order anyway."""
    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    runtime = GpuRuntime(trained, half=False, device="cpu")
    begun = [runtime.begin(tiles_of(8)) for _ in range(3)]
    copying, computing = runtime._copying.name, runtime._computing.name
    places, ready = [], []
    for number in range(3):
        entries = device.diary[6 * number : 6 * number + 6]
        copied, computed, done = (entries[n][2] for n in (2, 4, 5))
        assert entries == [
            ("caller", "waits for", copied),  # of the batch before the last one, which lay in the same place
            (copying, "waits for", computed),
            (copying, "records", copied),
            (computing, "waits for", copied),
            (computing, "records", computed),
            (computing, "records", done),
        ]
        places.append((copied, computed))
        ready.append(done)
    assert places[0] == places[2] != places[1]
    assert len({*ready, *places[0], *places[1]}) == 7
    before = len(device.diary)
    begun[1].result()
    assert device.diary[before:] == [("caller", "waits for", ready[1])]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here that torch can use")
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_on_a_gpu_the_model_that_ships_gives_the_same_and_does_not_depend_on_the_batch(precision):
    bundle = read_bundle(SHIPPED)
    form = bundle.form(precision, cuda=True)
    runtime, tiles = load_runtime(bundle, form, 0), tiles_of(1500)
    wanted = load_runtime(bundle, "float32", 0).predict(tiles)
    begun = [runtime.begin(tiles[start : start + 500]) for start in range(0, 1500, 500)]
    found = np.concatenate([each.result() for each in begun])
    assert np.abs(found - wanted).max() < {"float32": 0.001, "float16": 0.02}[form.precision]
    assert np.array_equal(runtime.predict(tiles), found)
