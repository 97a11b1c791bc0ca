"""The reader of bundled Keras models, on a tiny model that is built here as the npm package builds its own."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mmtok.bench import inception
from mmtok.bench.inception import InceptionFeatures, KerasGraph, load_inception, object_literal, read_model


def conv(name: str, source: str, filters: int, size: int, stride: int, padding: str, bias: bool) -> dict:
    settings = {
        "filters": filters,
        "kernel_size": [size, size],
        "strides": [stride, stride],
        "padding": padding,
        "dilation_rate": [1, 1],
        "activation": "linear",
        "use_bias": bias,
    }
    return layer(name, "Conv2D", [source], settings)


def layer(name: str, kind: str, sources: list[str], settings: dict | None = None) -> dict:
    nodes = [[[s, 0, 0, {}] for s in sources]] if sources else []
    return {"name": name, "class_name": kind, "config": {"name": name, **(settings or {})}, "inbound_nodes": nodes}


def pool(name: str, kind: str, source: str, stride: int, padding: str) -> dict:
    return layer(name, kind, [source], {"pool_size": [3, 3], "strides": [stride, stride], "padding": padding})


LAYERS = [
    layer("input_1", "InputLayer", []),
    conv("conv_1", "input_1", 4, 3, 2, "same", False),
    layer("norm_1", "BatchNormalization", ["conv_1"], {"epsilon": 1e-3, "scale": False, "center": True}),
    layer("relu_1", "Activation", ["norm_1"], {"activation": "relu"}),
    conv("conv_2", "relu_1", 5, 3, 1, "same", True),
    layer("norm_2", "BatchNormalization", ["conv_2"], {"epsilon": 1e-2, "scale": True, "center": False}),
    pool("average", "AveragePooling2D", "relu_1", 1, "same"),
    pool("halved", "AveragePooling2D", "norm_2", 2, "same"),
    pool("largest", "MaxPooling2D", "average", 2, "same"),
    layer("mixed", "Concatenate", ["halved", "largest"]),
    pool("last", "MaxPooling2D", "mixed", 2, "valid"),
    layer("dropped", "Dropout", ["last"]),
    layer("flat", "Flatten", ["dropped"]),
    layer("dense", "Dense", ["flat"], {"activation": "softmax"}),
]
SHAPES = {
    "conv_1/kernel": [3, 3, 3, 4],
    "norm_1/beta": [4],
    "norm_1/moving_mean": [4],
    "norm_1/moving_variance": [4],
    "conv_2/kernel": [3, 3, 4, 5],
    "conv_2/bias": [5],
    "norm_2/gamma": [5],
    "norm_2/moving_mean": [5],
    "norm_2/moving_variance": [5],
}


def minified(value: object) -> str:
    """JSON as a JavaScript minifier writes it: bare keys, !0 for true, no zero before the point."""
    text = json.dumps(value, separators=(",", ":"))
    text = re.sub(r'"([A-Za-z_]\w*)":', r"\1:", text).replace("true", "!0").replace("false", "!1")
    return re.sub(r"(?<=[:\[,-])0\.", ".", text)


def bundle(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Writes the model's scripts and returns the weights as they are after dequantisation."""
    rng = np.random.default_rng(seed)
    entries, data, weights = [], b"", {}
    for name, shape in SHAPES.items():
        low = 0.25 if "variance" in name or "gamma" in name else -0.5
        if name == "conv_2/bias":  # one that is not quantised
            values = rng.standard_normal(shape).astype("<f4")
            entries.append({"name": name, "shape": shape, "dtype": "float32"})
        else:
            values = rng.integers(0, 256, shape, dtype=np.uint8)
            how = {"min": low, "scale": 0.00390625, "dtype": "uint8"}
            entries.append({"name": name, "shape": shape, "dtype": "float32", "quantization": how})
        data += values.tobytes()
        real = values.astype("f4") * 0.00390625 + low if values.dtype == np.uint8 else values
        weights[name] = torch.from_numpy(real.astype("f4"))
    model = {
        "modelTopology": {"model_config": {"config": {"name": "tiny:1", "layers": LAYERS}}, "note": 'a "b": .5,!0'},
        "weightsManifest": [{"paths": ["group1-shard1of2", "group1-shard2of2"], "weights": entries}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.min.js").write_text(f"!function(n){{n.exports={minified(model)}}},{{}}]}});")
    for i, part in enumerate((data[:101], data[101:]), 1):
        text = base64.b64encode(part).decode()
        (folder / f"group1-shard{i}of2.min.js").write_text(f'!function(n){{n.exports="{text}"}},{{}}]}});')
    return weights


def same_padded(x: torch.Tensor, size: int, stride: int, value: float) -> torch.Tensor:
    total = max((-(-x.shape[3] // stride) - 1) * stride + size - x.shape[3], 0)
    left, right = total // 2, total - total // 2
    return F.pad(x, (left, right, left, right), value=value)


def expected(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tiny model written out, BatchNorms as they stand."""

    def kernel(name: str) -> torch.Tensor:
        return w[f"{name}/kernel"].permute(3, 2, 0, 1)

    def norm(h: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        mean, variance = w[f"{name}/moving_mean"], w[f"{name}/moving_variance"]
        return F.batch_norm(h, mean, variance, w.get(f"{name}/gamma"), w.get(f"{name}/beta"), False, 0.0, eps)

    def average(h: torch.Tensor, stride: int) -> torch.Tensor:
        ones = same_padded(torch.ones_like(h), 3, stride, 0.0)
        return F.avg_pool2d(same_padded(h, 3, stride, 0.0), 3, stride) / F.avg_pool2d(ones, 3, stride)

    a = norm(F.conv2d(same_padded(x, 3, 2, 0.0), kernel("conv_1"), None, 2), "norm_1", 1e-3).relu()
    b = norm(F.conv2d(same_padded(a, 3, 1, 0.0), kernel("conv_2"), w["conv_2/bias"]), "norm_2", 1e-2)
    c = F.max_pool2d(same_padded(average(a, 1), 3, 2, float("-inf")), 3, 2)
    return torch.cat([average(b, 2), c], 1)


@pytest.mark.parametrize("size", [17, 18, 31, 32])
def test_graph_equals_the_model_written_out(size: int, tmp_path: Path):
    """Even and odd sizes: TensorFlow's padding differs between the two."""
    weights = bundle(tmp_path)
    torch.manual_seed(0)
    x = torch.rand(2, 3, size, size)
    want = expected(x, weights)
    graph = load_inception(tmp_path, "mixed").graph
    with torch.no_grad():
        torch.testing.assert_close(graph(x), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(load_inception(tmp_path, "dropped").graph(x), F.max_pool2d(want, 3, 2))
    features = InceptionFeatures(graph, size)
    torch.testing.assert_close(features(x, batch_size=1), want.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_pictures_of_any_size_are_resized_and_frozen(tmp_path: Path):
    bundle(tmp_path)
    features = InceptionFeatures(load_inception(tmp_path, "mixed").graph, 32).eval()
    x = torch.rand(3, 3, 40, 25, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(x, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(features(x), features(small), atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in features.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(features(x), features(small), atol=1e-5, rtol=1e-5)
    for bad in (x[0], x[:, :1], (x * 255).byte()):
        with pytest.raises(ValueError, match="expected float pictures"):
            features(bad)


def test_bf16_is_near_and_comes_back_as_fp32(tmp_path: Path):
    bundle(tmp_path)
    network = InceptionFeatures(load_inception(tmp_path, "mixed").graph, 32).eval()
    x = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    exact, fast = network(x), network(x, bf16=True)
    assert fast.dtype == torch.float32 and not torch.equal(exact, fast)
    assert float((exact - fast).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("inside", ["", "dist/models/inception_v3", "package/dist/models/inception_v3"])
def test_model_is_found_in_the_package_and_below_helpers(inside: str, tmp_path: Path):
    weights = bundle(tmp_path / inside)
    topology, found = read_model(tmp_path)
    assert topology["layers"] == LAYERS and topology["name"] == "tiny:1"
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("exports={a:!0,b:!1,c:null}", {"a": True, "b": False, "c": None}),
        (
            "x.exports={a:.5,b:-.25,c:1.5,d:-3,e:[.1,-.2]}};",
            {"a": 0.5, "b": -0.25, "c": 1.5, "d": -3, "e": [0.1, -0.2]},
        ),
        ("exports={a:16788e-30,b:.5e-3}", {"a": 16788e-30, "b": 0.5e-3}),
        ('exports={$a_1:"k:.5,!0",b:"say \\"x:1\\""}', {"$a_1": "k:.5,!0", "b": 'say "x:1"'}),
    ],
)
def test_object_literals(text: str, value: dict):
    assert object_literal(text) == value


@pytest.mark.parametrize("damage", ["nothing", "shard", "short", "script", "long"])
def test_damage_is_one_clear_error(damage: str, tmp_path: Path):
    bundle(tmp_path)
    shard = tmp_path / "group1-shard2of2.min.js"
    if damage == "nothing":
        (tmp_path / "model.min.js").unlink()
    elif damage == "shard":
        shard.unlink()
    elif damage == "short":
        shard.write_text('n.exports="AAAA"')
    elif damage == "long":
        shard.write_text(shard.read_text().replace('exports="', 'exports="AAAA'))
    else:
        (tmp_path / "model.min.js").write_text("exports={layers:[")
    with pytest.raises(ValueError, match=r"fetch it (again|with)"):
        load_inception(tmp_path, "mixed")


def test_what_is_not_built_is_refused(tmp_path: Path):
    weights = bundle(tmp_path)
    with pytest.raises(ValueError, match="'dense'"):
        load_inception(tmp_path)  # the tiny model has no mixed10
    with pytest.raises(ValueError, match="got Dense"):
        KerasGraph({"layers": [*LAYERS[:-2], layer("dense", "Dense", ["dropped"])]}, weights, "dense")
    with pytest.raises(ValueError, match="conv_2/bias"):
        KerasGraph({"layers": LAYERS}, {k: v for k, v in weights.items() if k != "conv_2/bias"}, "mixed")
    twice = [*LAYERS[:2], layer("sum", "Concatenate", ["conv_1", "norm_1"])]
    twice.insert(2, LAYERS[2])
    with pytest.raises(ValueError, match="behind one"):  # a norm whose convolution is read elsewhere cannot be folded
        KerasGraph({"layers": twice}, weights, "sum")
    dilated = json.loads(json.dumps(LAYERS))
    dilated[1]["config"]["dilation_rate"] = [2, 2]
    with pytest.raises(ValueError, match="plain 2-D convolution"):
        KerasGraph({"layers": dilated}, weights, "mixed")


def test_real_model_where_it_was_fetched():
    folder = Path(inception.__file__).parents[2] / "data" / "helpers" / "nsfwjs"
    if not folder.is_dir():
        pytest.skip("python recipes/fetch_data.py --helpers was not run here")
    network = load_inception(folder)
    assert sum(p.numel() for p in network.parameters()) == 21_768_352
    cat = Path(inception.__file__).parents[1] / "assets" / "chelsea.jpg"
    x = torch.from_numpy(np.asarray(Image.open(cat).convert("RGB"), "float32") / 255).permute(2, 0, 1)[None]
    features = network(torch.cat([x, x.flip(3), torch.rand(x.shape, generator=torch.Generator().manual_seed(0))]))
    assert features.shape == (3, 2048)
    near, far = F.cosine_similarity(features[:1], features[1:]).tolist()
    assert near > 0.9 > far
