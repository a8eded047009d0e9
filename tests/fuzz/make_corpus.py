"""Write the corpus anew: `python -m tests.fuzz.make_corpus`. Small whole files, which the fuzz damages copies of."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.readers import CORPUS, draw_picture

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"


def tar_of(members: list[tuple[str, bytes]], form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def tiny_net() -> bytes:
    weights = numpy_helper.from_array(np.ones((2, 3), dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["output"])],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 3])],
        [weights],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    return model.SerializeToString(deterministic=True)


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    picture, label = draw_picture("PNG"), b"2"
    samples = [("a.png", picture), ("a.cls", label), ("ü" * 120 + ".png", picture), ("b/c.seg.png", picture)]
    files = {
        "plain.jpg": draw_picture("JPEG", quality=70),
        "turned.jpg": draw_picture("JPEG", quality=70, exif=exif),
        "progressive.jpg": draw_picture("JPEG", quality=50, progressive=True),
        "plain.png": picture,
        "plain.webp": draw_picture("WEBP"),
        "plain.bmp": draw_picture("BMP"),
        "not-listed.gif": draw_picture("GIF"),
        "not-listed.tif": draw_picture("TIFF"),
        "postscript.eps": POSTSCRIPT,
        "gnu.tar": tar_of(samples, tarfile.GNU_FORMAT),
        "pax.tar": tar_of(samples, tarfile.PAX_FORMAT),
        "tiny.onnx": tiny_net(),
    }
    for name, content in files.items():
        (CORPUS / name).write_bytes(content)


if __name__ == "__main__":
    main()
