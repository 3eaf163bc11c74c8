"""Every engine gives the graph's probabilities, the same bits whatever comes beside a tile, and tells nobody."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from wsi_idc.errors import ModelError
from wsi_idc.model.bundle import read_bundle
from wsi_idc.model.runtime import TorchRuntime, batch_of, load_runtime


def test_a_bundle_without_weights_cannot_run_on_a_gpu(bundle):
    with pytest.raises(ModelError, match=r"model\.safetensors are needed on a GPU"):
        read_bundle(bundle).form("auto", cuda=True)


@pytest.fixture
def trained(bundle):
    """A bundle with a network (of random weights) in all its forms."""
    import torch

    from wsi_idc.model.config import NetworkConfig
    from wsi_idc.model.network import build_network, export_onnx, save_weights

    torch.manual_seed(3)
    config = NetworkConfig(kind="idc-2016", input_px=32)
    network = build_network(config).eval()
    save_weights(network, bundle / "model.safetensors")
    export_onnx(network, bundle / "model.onnx")
    fields = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**fields, "network": config.model_dump(mode="json")}))
    return bundle


def test_weights_and_graph_agree(trained):
    loaded = read_bundle(trained)
    tiles = np.random.default_rng(0).integers(0, 256, (40, 50, 50, 3), dtype=np.uint8)
    by_graph = load_runtime(loaded, "float32", 1).predict(tiles)
    by_torch = TorchRuntime(loaded).predict(tiles)
    assert by_torch.dtype == np.float32 and by_torch.shape == (40,)
    assert by_graph.std() > 0
    assert np.abs(by_graph - by_torch).max() < 1e-4


def tiles_of(count, size=50):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("by", ["graph", "weights"])
def test_a_probability_is_the_same_bits_whatever_the_batch_and_the_threads(trained, by):
    """Batches come in any size, from several slides at once, and a runtime has any number of threads."""
    if by == "weights":
        (trained / "model.onnx").unlink()
    loaded, tiles = read_bundle(trained), tiles_of(100)
    one, three = (load_runtime(loaded, "float32", threads) for threads in (1, 3))
    whole = one.predict(tiles)
    assert whole.std() > 0
    assert np.array_equal(three.predict(tiles), whole)
    assert np.array_equal(one.predict(tiles[::-1]), whole[::-1])
    for size in (1, 7, 33):
        starts = range(0, 100, size)
        with ThreadPoolExecutor(4) as callers:
            begun = list(callers.map(lambda start, size=size: three.begin(tiles[start : start + size]), starts))
        assert np.array_equal(np.concatenate([each.result() for each in begun]), whole)


def test_a_graph_runs_in_the_precision_that_it_says(trained):
    """Not in bfloat16 where the processor has that: of this network, 0.001 of a probability."""
    loaded, tiles = read_bundle(trained), tiles_of(64)
    by_graph = load_runtime(loaded, loaded.form("float32"), 1).predict(tiles)
    (trained / "model.onnx").unlink()
    assert np.abs(by_graph - load_runtime(loaded, loaded.form("float32"), 1).predict(tiles)).max() < 1e-5


def test_a_rest_of_a_batch_is_filled_up_and_cut_off_again(trained):
    loaded = read_bundle(trained)
    runtime = load_runtime(loaded, "float32", 1)
    tiles = tiles_of(runtime.batch + 1)
    assert runtime.predict(tiles).shape == runtime.begin(tiles).result().shape == (runtime.batch + 1,)
    assert np.array_equal(runtime.predict(tiles[-1:]), runtime.predict(tiles)[-1:])


@pytest.mark.parametrize(("size", "batch"), [(8, 64), (50, 64), (96, 32), (224, 8), (512, 4), (4096, 4)])
def test_fewer_large_tiles_go_through_a_model_at_once(size, batch):
    assert batch_of(size) == batch


def test_no_engine_reports_that_it_is_used(trained):
    """Importing OpenVINO as a whole sends an event to a server and leaves a number for this user in the home folder."""
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('the network is asked')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from pathlib import Path\n"
        "from wsi_idc.model.bundle import read_bundle\n"
        "from wsi_idc.model.runtime import load_runtime\n"
        "load_runtime(read_bundle(Path(sys.argv[1])), 'float32', 1)\n"
        "assert 'openvino' in sys.modules\n"
        "print([name for name in sys.modules if 'telemetry' in name])\n"
    )
    home = trained / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "USERPROFILE": str(home)}
    for name in ("CI", "TF_BUILD", "JENKINS_URL"):  # where telemetry keeps still by itself
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code, trained], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert not list(home.iterdir())


def test_as_many_batches_as_a_runtime_asks_for_can_be_begun_before_a_result_is_fetched(trained):
    runtime = load_runtime(read_bundle(trained), "float32", 2)
    assert runtime.ahead > 2
    tiles = tiles_of(8)
    begun = [runtime.begin(tiles[n : n + 1]) for n in range(runtime.ahead)]
    assert [each.result().shape for each in begun] == [(1,)] * runtime.ahead
    assert runtime.begin(tiles[:0]).result().shape == (0,)


def test_the_threads_of_a_model_in_torch_are_its_own(trained):
    """They compute by themselves; what comes after, training for example, still has all cores."""
    import torch

    before = torch.get_num_threads()
    (trained / "model.onnx").unlink()
    runtime = load_runtime(read_bundle(trained), "float32", 2)
    runtime.predict(tiles_of(3))
    assert torch.get_num_threads() == before


def test_a_probability_by_torch_does_not_depend_on_the_batch_either(bundle):
    """A ResNet-50 in float32 differed in its last digits between batches of 1, 7 and 64 tiles."""
    import torch

    from wsi_idc.model.config import NetworkConfig
    from wsi_idc.model.network import build_network, save_weights

    torch.manual_seed(3)
    config = NetworkConfig(kind="resnet50", input_px=40)
    save_weights(build_network(config).eval(), bundle / "model.safetensors")
    fields = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**fields, "network": config.model_dump(mode="json")}))
    (bundle / "model.onnx").unlink()
    runtime = load_runtime(read_bundle(bundle), "float32", 2)
    tiles = np.random.default_rng(0).integers(0, 256, (9, 50, 50, 3), dtype=np.uint8)
    whole = runtime.predict(tiles)
    parts = [runtime.predict(tiles[start : start + 4]) for start in range(0, 9, 4)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_float32_comes_from_the_weights_where_there_is_no_float32_graph(trained):
    tiles = np.random.default_rng(0).integers(0, 256, (40, 50, 50, 3), dtype=np.uint8)
    by_graph = load_runtime(read_bundle(trained), "float32", 1).predict(tiles)
    (trained / "model.onnx").unlink()
    runtime = load_runtime(read_bundle(trained), "float32", 1)
    assert isinstance(runtime, TorchRuntime)
    assert np.abs(by_graph - runtime.predict(tiles)).max() < 1e-4


def test_any_number_of_tiles_is_scored(trained):
    runtime = load_runtime(read_bundle(trained), "auto", 1)
    tiles = np.random.default_rng(0).integers(0, 256, (300, 50, 50, 3), dtype=np.uint8)
    assert runtime.predict(tiles).shape == (300,)
    assert runtime.predict(tiles[:0]).shape == (0,)


def test_each_form_says_what_runs_how_and_where(trained):
    loaded = read_bundle(trained)
    ways = {(form.file, form.engine, form.precision, form.device) for form in loaded.forms()}
    assert ways == {
        ("model.onnx", "openvino", "float32", "cpu"),
        ("model.safetensors", "torch", "float16", "cuda"),
        ("model.safetensors", "torch", "float32", "cuda"),
    }
    assert len({str(loaded.made_from(form)) for form in loaded.forms()}) == 3
    assert loaded.digests() == {form.digest for form in loaded.forms()}
    with pytest.raises(ModelError, match="int8 on a GPU"):
        loaded.form("int8", cuda=True)
    (trained / "model.onnx").unlink()
    form = loaded.form("auto")
    assert (form.file, form.engine, form.precision, form.device) == ("model.safetensors", "torch", "float32", "cpu")


def test_torch_tells_two_classes_apart(trained):
    fields = json.loads((trained / "bundle.json").read_text())
    (trained / "bundle.json").write_text(json.dumps({**fields, "classes": ["a", "b", "c"]}))
    loaded = read_bundle(trained)
    with pytest.raises(ModelError, match=r"classes: 3 are named"):
        loaded.form("auto", cuda=True)
    (trained / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx is missing"):
        loaded.form("auto")


def test_weights_that_are_damaged_are_named(trained):
    (trained / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError):
        TorchRuntime(read_bundle(trained))


def test_threads_that_are_the_first_to_score_do_not_wait_for_each_other_for_ever(tmp_path, make):
    """They did in one of three processes where threads take turns often, and now and then anywhere."""
    make.write_bundle(tmp_path / "bundle")
    script = (
        "import sys; sys.setswitchinterval(1e-6)\n"
        "import numpy as np\n"
        "from wsi_idc.model.bundle import read_bundle\n"
        "from wsi_idc.model.runtime import load_runtime\n"
        "from pathlib import Path\n"
        "runtime = load_runtime(read_bundle(Path(sys.argv[1])), 'auto', 4)\n"
        "begun = [runtime.begin(np.zeros((64, 50, 50, 3), np.uint8)) for _ in range(8)]\n"
        "print(sum(len(one.result()) for one in begun))\n"
    )
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "bundle")], capture_output=True, text=True, timeout=120
        )
        assert done.stdout == "512\n", done.stderr
