"""Look into an ONNX file without the onnx package, which devices do not have."""

from pathlib import Path
from typing import Any, Dict, Iterator, Tuple, Union

from .errors import BundleError

# Messages of onnx.proto, and which of their fields hold messages that may hold a tensor: field number -> message.
_FIELDS: Dict[str, Dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_GRAPH_OF_MODEL = 7
_EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 13, 14, 1
_KEY, _VALUE = 1, 2


def check_self_contained(path: Union[str, Path]) -> None:
    """Refuse an ONNX file that reads weights from another file, which no hash of the bundle covers.

    Raises:
        BundleError: it does, or is not a whole ONNX file.
    """
    path = Path(path)
    try:
        content = memoryview(path.read_bytes())
    except OSError as exc:
        raise BundleError(
            "'%s' cannot be read: %s" % (path.name, exc.strerror), "export the bundle again"
        ) from exc
    try:
        _check_model(path.name, content)
    except (IndexError, ValueError) as exc:
        raise BundleError(
            "'%s' is not a whole ONNX file: %s" % (path.name, exc), "export the bundle again"
        ) from exc


def _check_model(name: str, content: memoryview) -> None:
    waiting = [("Model", content)]  # a list, not recursion: a hostile file may nest as deep as it likes
    graphs = 0
    while waiting:
        message, part = waiting.pop()
        for number, value in _fields(part):
            if message == "Model" and number == _GRAPH_OF_MODEL:
                graphs += 1
            if message == "Tensor" and (
                number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value == _EXTERNAL)
            ):
                raise BundleError(
                    "'%s' keeps weights outside itself, in %a" % (name, _location(part)),
                    "do not run this bundle; export it again: edgecl writes the weights into the file",
                )
            if number in _FIELDS[message]:
                if not isinstance(value, memoryview):
                    raise ValueError("field %d of %s holds no message" % (number, message))
                waiting.append((_FIELDS[message][number], value))
    if not graphs:
        raise ValueError("it holds no graph")


def _location(tensor: memoryview) -> str:
    """Return where a tensor says that its data lies."""
    for number, entry in _fields(tensor):
        if number == _EXTERNAL_DATA and isinstance(entry, memoryview):
            pair = dict(_fields(entry))
            if pair.get(_KEY) == b"location" and _VALUE in pair:
                return bytes(pair[_VALUE]).decode("utf-8", "replace")
    return "a file it does not name"


def _fields(message: memoryview) -> Iterator[Tuple[int, Any]]:
    """Yield the number and value of each field: an int for a varint, else the bytes.

    Source: the protocol buffers encoding, protobuf.dev/programming-guides/encoding.
    """
    place, end = 0, len(message)
    while place < end:
        tag, place = _varint(message, place)
        kind, value = tag & 7, None  # type: int, Any
        if kind == 0:
            value, place = _varint(message, place)
        else:
            if kind == 2:
                size, place = _varint(message, place)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError("a field of unknown kind %d" % kind)
            if place + size > end:
                raise ValueError("it ends %d bytes early" % (place + size - end))
            value, place = message[place : place + size], place + size
        yield tag >> 3, value


def _varint(message: memoryview, place: int) -> Tuple[int, int]:
    """Return a number of 7 bits a byte, the lowest first, and the place after it."""
    number = shift = 0
    while shift < 70:
        if place >= len(message):
            raise ValueError("it ends amid a number")
        byte = message[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
        shift += 7
    raise ValueError("a number of more than 10 bytes")
