"""Image shards -> feature shards: the right grids, statistics and formats, resumable, fast where it can be."""

import resource
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from preprocessing import fetch_weights
from preprocessing.annotations.read import read_annotations
from preprocessing.extract_features import extract_stripe, finalize_features
from preprocessing.extract_features import main as extract_program
from preprocessing.features import extractor, network
from preprocessing.features.network import COMPUTE, fast_forward, load_network
from preprocessing.features.plan import plan_features
from preprocessing.features.recipe import FeatureOptions
from preprocessing.features.statistics import restore
from preprocessing.features.weights import find_weights
from preprocessing.fetch_weights import Origin, convert, promised_digest
from preprocessing.fetch_weights import main as fetch
from preprocessing.shard_images import main as shard_images
from preprocessing.shard_images import plan_images, shard_stripe
from preprocessing.sharding.finalize import finalize
from sat import files
from sat.machine import best_precision
from sat.model.encoders.resnet import ResNet
from sat.model.encoders.table import load_encoder
from sat.model.encoders.weights import CONTENT_KEY, content_digest, read_about
from sat.shards.features import NPY_HEADER
from sat.shards.manifest import load_manifest, load_statistics
from sat.shards.pictures import decode, fit
from sat.shards.tar import TAR_BLOCK
from tests.helpers_shards import REPOSITORY, encoded, make_coco, picture, run_program, snapshot

SIZE, STAGE, DIM, CELLS = 32, 1, 256, 8
SMALL = {"size": SIZE, "stage": STAGE, "batch_size": 4, "compute": "fp32"}
OPTIONS = ("--size", SIZE, "--stage", STAGE, "--batch-size", 4, "--compute", "fp32")
TYPES = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32, "int8": np.int8}


def random_encoder(stage=STAGE):
    """A ResNet-50 of the first stages whose BatchNorms are not trivial, frozen."""
    torch.manual_seed(0)
    encoder = ResNet(stage=stage)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return encoder.requires_grad_(False).eval()


def random_weights(path):
    save_file({name: tensor.contiguous() for name, tensor in random_encoder().state_dict().items()}, path)
    return path


def make_images(root, out, **options):
    """Image shards of the pictures of `make_coco`, or of what lies there."""
    files = {path.stem.removeprefix("captions_"): path for path in sorted((root / "annotations").iterdir())}
    records = read_annotations([f"{s}={f}" for s, f in files.items()], image_root=root / "images")
    plan = plan_images(records, root / "images", out, **{"shard_size": 5, "seed": 1, "max_bad_fraction": 0} | options)
    shard_stripe(plan)
    return finalize(plan)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    make_coco(root / "coco")
    make_images(root / "coco", root / "images")
    random_weights(root / "weights.safetensors")
    return root


def extract(made, out, **options):
    plan = plan_features(made / "images", out, made / "weights.safetensors", FeatureOptions(**SMALL | options))
    extract_stripe(plan)
    return finalize_features(plan)


def grids_of(manifest) -> dict[str, np.ndarray]:
    """Restored float32 grid [L, D] of every key, read as the contract says."""
    dtype = manifest.fingerprint["dtype"]
    scale = load_statistics(manifest)["scale"]
    shape = (manifest.fingerprint["grid"][0] * manifest.fingerprint["grid"][1], manifest.fingerprint["dim"])
    grids = {}
    for index, shard in enumerate(manifest.shards):
        blob = Path(manifest.root, shard.name).read_bytes()
        for row in manifest.rows(index).to_pylist():
            start = row["offset"] + TAR_BLOCK + NPY_HEADER
            count = shape[0] * shape[1]
            stored = np.frombuffer(blob, TYPES[dtype], count, start).reshape(shape)
            grids[row["key"]] = restore(stored, dtype, scale)
    return grids


def expected_grids(made, keys) -> dict[str, np.ndarray]:
    """Independent: the plain encoder in fp32, one picture at a time (test_images compares `fit` with Pillow)."""
    encoder = load_encoder(made / "weights.safetensors", stage=STAGE)
    grids = {}
    for key in keys:
        (path,) = (made / "coco" / "images").glob(f"*/{int(key):06d}.jpg")
        pixels = fit(Image.open(path), SIZE)
        with torch.inference_mode():
            grids[key] = encoder(encoder.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None]))[0].numpy()
    return grids


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 5e-3), ("int8", 0.03)])
def test_every_grid_is_that_of_the_plain_encoder_in_every_format(made, tmp_path, dtype, error):
    manifest = extract(made, tmp_path / dtype, dtype=dtype)
    grids = grids_of(manifest)
    expected = expected_grids(made, grids)
    assert len(grids) == 17 and manifest.fingerprint["grid"] == [CELLS, CELLS] and manifest.fingerprint["dim"] == DIM
    for key, grid in grids.items():
        assert np.linalg.norm(grid - expected[key]) <= error * np.linalg.norm(expected[key]), key
    source = load_manifest(made / "images")
    columns = ["key", "image_id", "file_name", "split", "shard", "captions", "width", "height"]
    assert all(
        manifest.rows(i).select(columns).equals(source.rows(i).select(columns)) for i in range(len(source.shards))
    )


@pytest.mark.parametrize(("cores", "shares"), [(1, [1]), (2, [1, 1]), (3, [2, 1]), (16, [8, 8])])
def test_batches_in_the_network_share_the_cores_and_change_no_bit(made, tmp_path, monkeypatch, cores, shares):
    taken, take, before = [], torch.set_num_threads, torch.get_num_threads()
    monkeypatch.setattr(extractor, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: (taken.append(number), take(min(number, 2))))
    try:
        with extractor._network_threads("cpu") as pool:
            together = threading.Barrier(len(shares))
            list(pool.map(lambda _: together.wait(60), shares))
        assert sorted(taken) == sorted(shares)
        manifest = extract(made, tmp_path / "features")
        assert taken[-1] == cores  # for threads to come
    finally:
        monkeypatch.undo()
        take(before)
    assert manifest.digest == extract(made, tmp_path / "again").digest


def test_statistics_are_those_of_the_stored_values_of_the_training_split(made, tmp_path):
    for dtype in ("bf16", "int8"):
        manifest = extract(made, tmp_path / dtype, dtype=dtype)
        train = {r["key"] for i in manifest.shards.of_split("train") for r in manifest.rows(i).to_pylist()}
        values = np.stack([grid for key, grid in grids_of(manifest).items() if key in train]).astype(np.float64)
        statistics = load_statistics(manifest)
        assert np.allclose(statistics["mean"], values.mean((0, 1)), rtol=1e-5, atol=1e-6)
        assert np.allclose(statistics["std"], np.maximum(values.std((0, 1)), 1e-6), rtol=1e-4, atol=1e-6)
    assert (statistics["scale"] > 0).all() and "scale_sha256" in manifest.fingerprint


@pytest.mark.skipif(best_precision() != "bf16", reason="this CPU does not compute in bf16")
def test_the_network_in_bf16_is_within_two_percent(made, tmp_path):
    grids = grids_of(extract(made, tmp_path / "bf16", compute="bf16"))
    for key, grid in expected_grids(made, grids).items():
        assert np.linalg.norm(grids[key] - grid) <= 0.02 * np.linalg.norm(grid)


def test_bf16_is_refused_before_the_plan_by_a_machine_that_cannot(made, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "best_precision", lambda: "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cannot compute in bf16 .*--compute fp32"):
        extract_program(tmp_path / "out", made / "images", str(made / "weights.safetensors"), size=64, compute="bf16")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="cannot compute in bf16"):  # planned elsewhere
        extract(made, tmp_path / "planned", compute="bf16")
    assert not list((tmp_path / "planned").glob("*.tar"))


@pytest.mark.parametrize("stage", [1, 4])
def test_fused_convolutions_give_what_the_encoder_gives_at_every_stage(stage):
    encoder = random_encoder(stage)
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        found = fast_forward(encoder, 64, "fp32", "cpu", 0)(images.to(memory_format=torch.channels_last))
        expected = encoder(images)
    assert found.shape == expected.shape and (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("size", "grid"), [(224, [7, 7]), (448, [14, 14])])
def test_the_grid_follows_from_the_size(made, tmp_path, size, grid):
    plan = plan_features(
        made / "images", tmp_path, made / "weights.safetensors", FeatureOptions(size=size, compute="fp32")
    )
    assert plan.fingerprint["grid"] == grid and plan.fingerprint["dim"] == 2048


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 225}, "size 225 is not a multiple of 4"),
        ({"stage": 5}, "stage 5 does not exist; choose one of .*1, 2, 3, 4"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; choose one of bf16, fp16, fp32, int8"),
        ({"geometry": "stretch"}, "choose one of squash, center_crop"),
        ({"compute": "fp16"}, "choose one of auto, bf16, fp32"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"statistics_splits": ("train", "trian")}, "--statistics-split trian: .* no such split, only train, val"),
    ],
)
def test_settings_that_do_not_exist_are_refused_with_the_choices(made, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        plan_features(made / "images", tmp_path, made / "weights.safetensors", FeatureOptions(**SMALL | options))


@pytest.mark.faults
@pytest.mark.parametrize("geometry", ["squash", "center_crop"])
def test_exif_orientations_give_the_features_of_the_upright_picture(tmp_path, geometry):
    random_weights(tmp_path / "weights.safetensors")
    network = load_network(tmp_path / "weights.safetensors", STAGE, SIZE, "fp32")
    upright = picture(2, (96, 64))
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4]  # Transpose methods that store it under tag 2..8
    batch = []
    for tag in range(1, 9):
        stored = upright if tag == 1 else upright.transpose(Image.Transpose(undo[tag]))
        exif = Image.Exif()
        exif[0x0112] = tag
        batch.append(fit(decode(encoded(stored, "PNG", exif=exif)), SIZE, geometry))
    grids = network(np.stack(batch))
    assert all(np.array_equal(grid, grids[0]) for grid in grids) and grids[0].std() > 0


def test_stripes_and_interruptions_change_no_byte_and_a_second_run_does_not_import_torch(made, tmp_path):
    extract(made, tmp_path / "once", compute="fp32")
    plan = plan_features(made / "images", tmp_path / "twice", made / "weights.safetensors", FeatureOptions(**SMALL))
    extract_stripe(plan, stripe="1/2")
    with pytest.raises(ValueError, match="train-000000.tar is missing"):
        finalize_features(plan)
    extract_stripe(plan)
    finalize_features(plan)
    assert snapshot(tmp_path / "twice") == snapshot(tmp_path / "once")
    program = (
        "import sys; from pathlib import Path; from preprocessing.extract_features import main; "
        "out, images, weights = sys.argv[1:]; main(Path(out), Path(images), weights, size=32, stage=1, batch_size=4); "
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, tmp_path / "twice", made / "images", made / "weights.safetensors"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "0 shards written, 4 reused" in done.stdout, done.stderr


def test_several_processes_share_the_shards(made, tmp_path):
    done = run_program(
        "extract_features",
        *("--images", made / "images", "--out", tmp_path, "--weights", made / "weights.safetensors"),
        *(*OPTIONS, "--num-workers", 2),
    )
    assert "4 shards written, 0 reused: 17 images" in done.stdout
    grids = grids_of(load_manifest(tmp_path))
    expected = expected_grids(made, grids)
    assert all(np.allclose(grids[key], expected[key], rtol=0.01, atol=0.01) for key in expected)


@pytest.mark.faults
def test_missing_weights_are_told_in_seconds_with_the_command(made, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    failed = run_program(
        "extract_features", "--images", made / "images", "--out", tmp_path, "--weights-dir", tmp_path, code=1
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 5, "of CPU time: another program on this machine must not make this fail"
    command = f"python -m preprocessing.fetch_weights resnet50 --out {tmp_path}/resnet50-imagenet.safetensors"
    assert command in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.faults
def test_damaged_or_unverifiable_imagenet_weights_are_refused(made, tmp_path):
    path = tmp_path / "resnet50-imagenet.safetensors"
    tensors = {"a": torch.arange(9.0), "b": torch.zeros(3, dtype=torch.int64)}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="no digest.*fetch_weights"):
        find_weights("imagenet", tmp_path)
    save_file(tensors, path, metadata={CONTENT_KEY: content_digest(path)})
    assert find_weights("imagenet", tmp_path) == path
    sound = path.read_bytes()
    for place in (-1, -20, sound.index(b"data_offsets") + 16):
        damaged = bytearray(sound)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|not a whole safetensors"):
            find_weights("imagenet", tmp_path)


@pytest.mark.faults
def test_fetched_weights_are_used_only_with_the_digest_their_name_promises(tmp_path, capsys):
    torch.save(random_encoder().state_dict(), tmp_path / "w.pth")
    name = f"resnet50-{files.sha256(tmp_path / 'w.pth')[:8]}.pth"
    (tmp_path / "w.pth").rename(tmp_path / name)
    fetch(out=tmp_path / "out.safetensors", file=tmp_path / name)
    assert read_about(tmp_path / "out.safetensors").architecture == "resnet50"
    assert load_encoder(find_weights(str(tmp_path / "out.safetensors")), stage=STAGE)
    fetch(out=tmp_path / "out.safetensors")
    assert "there already and sound" in capsys.readouterr().out
    with pytest.raises(ValueError, match="damaged or another file; not used"):
        convert(tmp_path / name, Origin("", "x", "00000000"), "resnet50", tmp_path / "never.safetensors")
    with pytest.raises(ValueError, match="nothing can be verified"):
        promised_digest("resnet50.pth")
    assert not (tmp_path / "never.safetensors").exists()


@pytest.mark.faults
def test_weights_come_from_a_server_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    torch.save(random_encoder().state_dict(), tmp_path / "w.pth")
    name = f"resnet50-{files.sha256(tmp_path / 'w.pth')[:8]}.pth"
    (tmp_path / "w.pth").rename(tmp_path / "served" / name)
    (tmp_path / "served" / "resnet50-00000000.pth").write_bytes(b"damaged on the way")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        served = {("resnet50", "v1"): f"{base}/{name}", ("resnet50", "v2"): f"{base}/resnet50-00000000.pth"}
        monkeypatch.setattr(fetch_weights, "URLS", served)
        fetch(out=tmp_path / "out.safetensors")
        with pytest.raises(ValueError, match="resnet50-00000000.pth.*not used"):
            fetch(out=tmp_path / "bad.safetensors", version="v2")
        server.shutdown()
    with pytest.raises(ValueError, match="cannot be fetched.*--file"):
        fetch(out=tmp_path / "bad.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "served"]
    assert load_encoder(tmp_path / "out.safetensors", stage=STAGE)


@pytest.mark.faults
def test_image_shards_that_changed_since_the_plan_are_refused(made, tmp_path):
    make_coco(tmp_path / "coco", {"train": 6})
    make_images(tmp_path / "coco", tmp_path / "images")
    plan = plan_features(
        tmp_path / "images", tmp_path / "features", made / "weights.safetensors", FeatureOptions(**SMALL)
    )
    make_images(tmp_path / "coco", tmp_path / "images", seed=2, overwrite=True)
    with pytest.raises(ValueError, match="run the plan step again"):
        extract_stripe(plan)


def test_a_folder_planned_for_features_takes_no_pictures(made, tmp_path):
    plan_features(made / "images", tmp_path, made / "weights.safetensors", FeatureOptions(**SMALL))
    with pytest.raises(ValueError, match="planned to hold features"):
        shard_images(tmp_path, step="shards", num_workers=1)
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_grids_within_two_percent(made):
    pixels = np.stack([np.asarray(picture(i, (SIZE, SIZE))) for i in range(4)])
    gpu = load_network(made / "weights.safetensors", STAGE, SIZE, "fp32", "cuda")(pixels)
    cpu = load_network(made / "weights.safetensors", STAGE, SIZE, "fp32", "cpu")(pixels)
    assert np.linalg.norm(gpu - cpu) <= 0.02 * np.linalg.norm(cpu)


@pytest.mark.faults
def test_features_that_are_not_finite_are_refused_by_key(made, tmp_path):
    tensors = random_encoder().state_dict()
    tensors["layer1.2.bn3.weight"].fill_(1e6)  # beyond fp16, well within bf16
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "large.safetensors")
    options = FeatureOptions(**SMALL | {"dtype": "fp16"})
    plan = plan_features(made / "images", tmp_path / "fp16", tmp_path / "large.safetensors", options)
    with pytest.raises(ValueError, match=r"\.tar: the features of \d of \d pictures are not finite in fp16, .* key \d"):
        extract_stripe(plan)
    assert not list((tmp_path / "fp16").glob("*.tar"))
    plan = plan_features(made / "images", tmp_path / "bf16", tmp_path / "large.safetensors", FeatureOptions(**SMALL))
    extract_stripe(plan)
    assert len(finalize_features(plan).shards) == 4


def test_the_best_precision_of_this_machine_is_one_the_network_has():
    assert best_precision() in COMPUTE


def test_pixels_are_normalised_as_the_encoder_asks_for(made):
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    encoder = load_encoder(made / "weights.safetensors", stage=STAGE)
    found = load_network(made / "weights.safetensors", STAGE, SIZE, "fp32")(pixels)
    with torch.inference_mode():
        expected = encoder(encoder.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))).numpy()
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
