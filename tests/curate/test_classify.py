"""The backends of the classifier on real files: ONNX, timm and torchvision."""

import numpy as np
import pytest
from av.video.frame import VideoFrame

from vito_fast.curate import analyse, classify
from vito_fast.curate.options import ClassifyOptions
from vito_fast.errors import UserError


def field(number: int, value: bytes | str | int) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return bytes([number << 3]) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def onnx_model(weights: np.ndarray, size: int, softmax: bool) -> bytes:
    """The mean of each channel times (3, 1000) ``weights``, as logits or probabilities of (N, 3, size, size) images."""
    nodes = [("GlobalAveragePool", ["x"]), ("Flatten", ["GlobalAveragePool"]), ("MatMul", ["Flatten", "w"])]
    nodes += [("Softmax", ["MatMul"])] if softmax else []

    def node(kind: str, inputs: list[str]) -> bytes:
        return b"".join(field(1, name) for name in inputs) + field(2, kind) + field(4, kind)

    def value(name: str, *dims: int | str) -> bytes:
        shape = b"".join(field(1, field(1 if isinstance(dim, int) else 2, dim)) for dim in dims)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    tensor = (
        b"".join(field(1, dim) for dim in weights.shape) + field(2, 1) + field(8, "w") + field(9, weights.tobytes())
    )
    graph = b"".join(field(1, node(*one)) for one in nodes) + field(2, "means") + field(5, tensor)
    graph += field(11, value("x", "N", 3, size, size)) + field(12, value(nodes[-1][0], "N", 1000))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


@pytest.mark.parametrize("softmax", [False, True])
def test_an_onnx_file_gives_the_probabilities_of_its_graph(tmp_path, softmax):
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weights, frames = rng.normal(0, 1, (3, 1000)).astype(np.float32), rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    (tmp_path / "m.onnx").write_bytes(onnx_model(weights, 32, softmax))
    options = ClassifyOptions(str(tmp_path / "m.onnx"), device="cpu")
    classifier = classify.load(options)
    assert classifier.size == 32
    means = (frames.mean((1, 2)) / 255 - classify.IMAGENET[0]) / classify.IMAGENET[1]
    wanted = np.exp(means @ weights)
    np.testing.assert_allclose(classifier(frames), wanted / wanted.sum(1, keepdims=True), rtol=1e-4)
    before = classify.fingerprint(options)
    (tmp_path / "m.onnx").write_bytes(onnx_model(2 * weights, 32, softmax))
    assert classify.fingerprint(options) != before


def test_a_file_that_is_no_model_is_one_line(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_text("nothing")
    with pytest.raises(UserError, match=r"m\.onnx is no ONNX model"):
        classify.load(ClassifyOptions(str(tmp_path / "m.onnx"), device="cpu"))
    with pytest.raises(UserError, match="no such classifier"):
        classify.load(ClassifyOptions(str(tmp_path / "other.onnx"), device="cpu"))


@pytest.mark.parametrize("name", ["timm:test_efficientnet", "torchvision:squeezenet1_1"])
def test_a_model_with_weights_of_a_file_gives_its_own_probabilities(tmp_path, name):
    torch = pytest.importorskip("torch")
    kind, _, model = name.partition(":")
    package = pytest.importorskip(kind)
    torch.manual_seed(0)
    module = package.create_model(model) if kind == "timm" else package.models.get_model(model)
    pytest.importorskip("safetensors.torch").save_file(module.state_dict(), tmp_path / "w.safetensors")
    options = ClassifyOptions(name, str(tmp_path / "w.safetensors"), "cpu")
    classifier = classify.load(options)
    frames = np.random.default_rng(0).integers(0, 256, (2, classifier.size, classifier.size, 3), np.uint8)
    with torch.inference_mode():
        images = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
        wanted = module.eval()((images - classifier._mean) / classifier._std).softmax(-1)
    np.testing.assert_allclose(classifier(frames), wanted.numpy(), rtol=1e-3, atol=1e-6)
    assert classify.fingerprint(options) != classify.fingerprint(ClassifyOptions(name, __file__, "cpu"))


@pytest.mark.parametrize("upright", [False, True])
def test_the_squares_of_a_clip_see_the_middle_and_both_ends_in_turn(upright):
    ramp = np.broadcast_to(np.linspace(16, 235, 640).astype(np.uint8)[None, :, None], (360, 640, 3))
    picture = np.ascontiguousarray(ramp.transpose(1, 0, 2) if upright else ramp)
    frame = VideoFrame.from_ndarray(picture, format="rgb24")
    seen = [analyse.square(frame, 224, turn) for turn in range(5)]
    assert {view.shape for view in seen} == {(224, 224, 3)}
    spans = [(int(view.min()), int(view.max())) for view in seen]
    assert spans[0] == spans[4]
    for (low, high), (share, place) in zip(spans, analyse.VIEWS, strict=False):
        width = 360 * share
        left = (640 - width) * place
        assert low == pytest.approx(16 + 219 * left / 640, abs=4)
        assert high == pytest.approx(16 + 219 * (left + width) / 640, abs=4)
