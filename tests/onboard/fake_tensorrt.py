# ruff: noqa: UP031, RUF005, PTH123
"""A `tensorrt` module of a chosen version, without a GPU: the attributes that version has, and no others.

A plan of it is the ONNX file; running it runs ONNX Runtime, on the memory of fake_cudart, when the stream gets there.
It notes every call that matters in `calls`. What it lacks of a version raises AttributeError, as the bindings do; so
does setting an attribute that the version does not know. Python 3.6 grammar, since one test runs it there.

Which version has what: https://docs.nvidia.com/deeplearning/tensorrt, the API changes of each release.
"""

import ctypes
import json
import types
from collections import namedtuple

import numpy as np
import onnxruntime

MAGIC = b"FAKEPLAN"
LAYER_TYPES = {
    "Conv": "CONVOLUTION",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "Cast": "CAST",
    "Relu": "ACTIVATION",
    "GlobalAveragePool": "POOLING",
    "Flatten": "SHUFFLE",
}

Tensor = namedtuple("Tensor", "name dtype")
LogSeverity = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class Value:
    """One value of an enumeration; prints as the bindings' do."""

    def __init__(self, kind, name, number):
        self.kind, self.name, self.number = kind, name, number

    def __str__(self):
        return "%s.%s" % (self.kind, self.name)

    def __int__(self):
        return self.number

    def __index__(self):
        return self.number


def enum(kind, names):
    values = {name: Value(kind, name, number) for number, name in enumerate(names)}
    return type(kind, (), dict(values, __members__=values))


class Strict:
    """Takes no attribute that it was not given: a misspelt or removed one is an error, as in the bindings."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __setattr__(self, name, value):
        if name not in self.__dict__:
            raise AttributeError("'%s' object has no attribute '%s'" % (type(self).__name__, name))
        self.__dict__["calls"].append("%s = %s" % (name, value))
        self.__dict__[name] = value


class Behavior:
    """What a test wants to go wrong, or to be there."""

    def __init__(self):
        self.fast = {"fp16": True, "int8": True}
        self.dla_cores = 0
        self.delivered = None  # what the engine computes in, if not what was asked
        self.failure = None  # what the builder says before it returns nothing
        self.unparsed = None  # (node, operator, text) that the parser complains of
        self.names_only = False  # the inspector knows names only
        self.capturable = True
        self.context = True
        self.timing_cache_fits = True


def nodes_of(content):
    """Return (type, inputs, outputs, type of the first input, name) of every node of an ONNX file."""
    try:
        import onnx
    except ImportError:  # Python 3.6: one layer will do for the sequence of calls
        return [("Conv", ["input"], ["output"], "FLOAT", "conv")]
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    graph = model.graph
    types_of = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info]}
    types_of.update({value.name: value.data_type for value in graph.initializer})

    def kind_of(node):
        return {3: "INT8", 10: "HALF"}.get(types_of.get(node.input[0]), "FLOAT")

    return [
        (node.op_type, list(node.input), list(node.output), kind_of(node), node.name or node.output[0])
        for node in graph.node
    ]


class FakeTensorrt(types.ModuleType):
    """The module.

    Args:
        version: such as '8.2.1.8'.
        cuda: a FakeCudart, whose streams and memory engines run on; None where nothing is run.
    """

    def __init__(self, version, cuda=None):
        types.ModuleType.__init__(self, "tensorrt")
        self.__version__ = version
        self.number = number = tuple(int(part) for part in version.split(".")[:2])
        self.cuda = cuda
        self.calls = calls = []
        self.behavior = Behavior()
        self.loggers = []
        flags = ["TF32", "GPU_FALLBACK"] + (["FP16", "INT8"] if number < (11, 0) else [])
        self.BuilderFlag = enum("BuilderFlag", flags)
        kinds = ["EXPLICIT_BATCH"] if number < (11, 0) else []
        kinds += ["STRONGLY_TYPED"] if number >= (10, 0) else []
        self.NetworkDefinitionCreationFlag = enum("NetworkDefinitionCreationFlag", kinds)
        self.DataType = enum("DataType", ["FLOAT", "HALF", "INT8"] + (["UINT8"] if number >= (8, 5) else []))
        self.LayerType = enum("LayerType", sorted(set(LAYER_TYPES.values())) + ["ELEMENTWISE"])
        self.DeviceType = enum("DeviceType", ["GPU", "DLA"])
        self.ProfilingVerbosity = enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "NONE", "DETAILED"])
        self.LayerInformationFormat = enum("LayerInformationFormat", ["ONELINE", "JSON"])
        self.Dims4 = tuple
        if number >= (8, 4):
            self.MemoryPoolType = enum("MemoryPoolType", ["WORKSPACE"])
        if number >= (8, 5):
            self.TensorIOMode = enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
        module = self

        class ILogger:
            Severity = enum("Severity", LogSeverity)

            def __init__(self):
                module.loggers.append(self)

        self.ILogger = ILogger
        self.Builder = lambda logger: _builder(module, logger)
        self.OnnxParser = lambda network, logger: Parser(module, network, logger)
        self.Runtime = lambda logger: Loader(module, logger)
        del calls[:]

    def say(self, severity, message):
        # Only the first logger of a process hears anything.
        self.loggers[0].log(getattr(self.ILogger.Severity, severity), message)


class Builder(Strict):
    def create_network(self, flags=0):
        self.module.calls.append("create_network(%d)" % flags)
        kinds = self.module.NetworkDefinitionCreationFlag.__members__
        typed = "STRONGLY_TYPED" in kinds and bool(flags & (1 << int(kinds["STRONGLY_TYPED"])))
        if self.module.number < (10, 0):
            assert flags == 1, "a network without EXPLICIT_BATCH"
        return Network(
            module=self.module, calls=self.module.calls, typed=typed or self.module.number >= (11, 0)
        )

    def create_builder_config(self):
        return _config(self.module)

    def create_optimization_profile(self):
        return Profile(calls=self.module.calls)

    def build_serialized_network(self, network, config):
        module, behavior = self.module, self.module.behavior
        module.calls.append("build_serialized_network")
        if behavior.failure is not None:
            module.say("ERROR", behavior.failure)
            return None
        plan = {
            "version": module.__version__,
            "typed": network.typed,
            "flags": sorted(config.flags_set),
            "detailed": str(config.profiling_verbosity).endswith("DETAILED"),
            "delivered": behavior.delivered,
            "shapes": config.shapes,
        }
        header = json.dumps(plan, sort_keys=True).encode("ascii")
        return MAGIC + header + b"\n" + network.content


def _builder(module, logger):
    assert logger is module.loggers[0], "a second logger, which TensorRT ignores"
    attributes = {"module": module, "calls": module.calls, "num_DLA_cores": module.behavior.dla_cores}
    if module.number < (11, 0):
        for name, fast in module.behavior.fast.items():
            attributes["platform_has_fast_" + name] = fast
    return Builder(**attributes)


class Profile(Strict):
    def set_shape(self, name, least, best, most):
        self.__dict__["shapes"] = [list(least), list(best), list(most)]
        self.calls.append("set_shape(%s, %s, %s, %s)" % (name, list(least), list(best), list(most)))


class Config(Strict):
    def set_flag(self, flag):
        self.calls.append("set_flag(%s)" % flag.name)
        self.flags_set.add(flag.name)

    def clear_flag(self, flag):
        self.calls.append("clear_flag(%s)" % flag.name)
        self.flags_set.discard(flag.name)

    def add_optimization_profile(self, profile):
        self.__dict__["shapes"] = profile.shapes
        return 0

    def create_timing_cache(self, content):
        return Cache(content=bytes(content))

    def set_timing_cache(self, cache, ignore_mismatch):
        fits = self.module.behavior.timing_cache_fits or not cache.content
        self.calls.append(
            "set_timing_cache(%d bytes, %s) -> %s" % (len(cache.content), ignore_mismatch, fits)
        )
        self.__dict__["cache"] = cache if fits else None
        return fits

    def get_timing_cache(self):
        return self.cache


class LaterConfig(Config):
    def set_memory_pool_limit(self, pool, size):
        self.calls.append("set_memory_pool_limit(%s, %d)" % (pool.name, size))


class Cache(Strict):
    def serialize(self):
        return b"timings"


def _config(module):
    attributes = {"module": module, "calls": module.calls, "flags_set": {"TF32"}, "DLA_core": -1}
    attributes.update(dict.fromkeys(("shapes", "cache", "profiling_verbosity", "default_device_type")))
    if module.number < (10, 0):
        attributes["max_workspace_size"] = 0
    if module.number >= (8, 6):
        attributes["builder_optimization_level"] = 3
    return (Config if module.number < (8, 4) else LaterConfig)(**attributes)


def kind_of_end(module, value):
    return module.DataType.UINT8 if value.type == "tensor(uint8)" else module.DataType.FLOAT


class Network(Strict):
    """What the parser filled in."""

    def read(self, content):
        self.__dict__.update(content=content, nodes=nodes_of(content))
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.__dict__.update(
            inputs=[Tensor(value.name, kind_of_end(self.module, value)) for value in session.get_inputs()],
            outputs=[Tensor(value.name, kind_of_end(self.module, value)) for value in session.get_outputs()],
        )

    num_layers = property(lambda self: len(self.nodes))
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]

    def get_layer(self, index):
        return Layer(self.module, self.nodes[index])


class Layer:
    def __init__(self, module, node):
        operator, self.inputs, self.outputs, kind, self.name = node
        self.type = getattr(module.LayerType, LAYER_TYPES.get(operator, "ELEMENTWISE"))
        self.dtype = getattr(module.DataType, kind)
        self.num_inputs = len(self.inputs)

    def get_input(self, index):
        return Tensor(self.inputs[index], self.dtype)

    def get_output(self, index):
        return Tensor(self.outputs[index], self.dtype)


class Parser:
    def __init__(self, module, network, logger):
        assert logger is module.loggers[0]
        self.module, self.network, self.errors = module, network, []

    num_errors = property(lambda self: len(self.errors))

    def parse_from_file(self, path):
        assert isinstance(path, str)
        self.module.calls.append("parse_from_file")
        with open(path, "rb") as file:
            content = file.read()
        if self.module.behavior.unparsed:
            kind = LaterError if self.module.number >= (10, 0) else Error
            self.errors.append(kind(*self.module.behavior.unparsed))
            return False
        self.network.read(content)
        return True

    def get_error(self, index):
        return self.errors[index]


class Error:
    def __init__(self, node, name, operator, text):
        self.values = (node, name, operator, text)

    def node(self):
        return self.values[0]

    def desc(self):
        return self.values[3]


class LaterError(Error):
    def node_name(self):
        return self.values[1]

    def node_operator(self):
        return self.values[2]


class Loader:
    """IRuntime."""

    def __init__(self, module, logger):
        assert logger is module.loggers[0]
        self.module = module
        self.DLA_core = -1

    def deserialize_cuda_engine(self, plan):
        plan = bytes(plan)
        header, _, content = plan[len(MAGIC) :].partition(b"\n")
        about = json.loads(header.decode("ascii")) if plan.startswith(MAGIC) else {}
        if about.get("version") != self.module.__version__:
            self.module.say(
                "ERROR", "Version tag does not match. Note: Current Version: 213, Serialized Engine 205"
            )
            return None
        self.module.calls.append("deserialize_cuda_engine")
        return (OldEngine if self.module.number < (8, 5) else Engine)(self.module, about, content)


class PlainEngine:
    """Found by number or, from 8.5 on, by name; both in between, where the code takes the later."""

    def __init__(self, module, about, content):
        self.module, self.about = module, about
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.nodes = nodes_of(content)
        self.names = [self.session.get_inputs()[0].name, self.session.get_outputs()[0].name]
        self.num_layers = len(self.nodes)

    def create_execution_context(self):
        if not self.module.behavior.context:
            self.module.say("ERROR", "Requested amount of GPU memory (1024 bytes) could not be allocated.")
            return None
        return (OldContext if self.module.number < (8, 5) else Context)(self)

    def create_engine_inspector(self):
        return Inspector(self)


class OldEngine(PlainEngine):
    num_bindings = 2

    def get_binding_name(self, index):
        return self.names[index]

    def binding_is_input(self, index):
        return index == 0

    def get_binding_dtype(self, index):
        return self.module.DataType.FLOAT


class Engine(PlainEngine):
    num_io_tensors = 2

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        modes = self.module.TensorIOMode
        return modes.INPUT if name == self.names[0] else modes.OUTPUT

    def get_tensor_dtype(self, name):
        ends = self.session.get_inputs() + self.session.get_outputs()
        return next(kind_of_end(self.module, value) for value in ends if value.name == name)


class Inspector:
    """Writes what versions 8, 10 and 11 write, as public examples show it."""

    def __init__(self, engine):
        self.engine = engine

    def get_layer_information(self, index, form):
        return json.dumps(self._layers()[index])

    def get_engine_information(self, form):
        assert form.name == "JSON"
        return json.dumps({"Layers": self._layers(), "Bindings": self.engine.names})

    def _layers(self):
        engine, module = self.engine, self.engine.module
        if module.behavior.names_only or not engine.about["detailed"]:
            return [node[4] for node in engine.nodes]
        dequantized = {output for node in engine.nodes if node[0] == "DequantizeLinear" for output in node[2]}
        layers = []
        for operator, inputs, _, kind, name in engine.nodes:
            if inputs[0] in dequantized:
                precision = "int8"
            elif kind == "HALF" or (not engine.about["typed"] and "FP16" in engine.about["flags"]):
                precision = "fp16"
            else:
                precision = "fp32"
            layers.append(
                describe_layer(module.number, operator, name, engine.about["delivered"] or precision)
            )
        return layers


def describe_layer(number, operator, name, precision):
    if number < (10, 0):
        text = {"fp32": "Row major linear FP32", "fp16": "Channel major FP16 format where channel % 4 == 0"}
        tensors = [
            {"Name": name, "Dimensions": [1, 6], "Format/Datatype": text.get(precision, "Int8 format.")}
        ]
        layer = {"Name": name, "LayerType": operator, "Inputs": tensors, "Outputs": tensors}
        if operator == "Conv":
            kind = {"fp32": "Float", "fp16": "Half", "int8": "Int8"}[precision]
            layer.update(LayerType="CaskConvolution", Weights={"Type": kind, "Count": 162})
        return layer
    key = "Format/Datatype" if number < (11, 0) else "Datatype"
    tensors = [{"Name": name, key: {"fp32": "Float", "fp16": "Half", "int8": "Int8"}[precision]}]
    kind = "correlation" if operator == "Conv" else "kgen"
    return {"Name": name, "LayerType": kind, "Inputs": tensors, "Outputs": tensors, "TacticName": "0x1"}


class PlainContext:
    def __init__(self, engine):
        self.engine, self.module = engine, engine.module
        self.shape = None
        self.set_up_for = None
        self.addresses = {}

    def _fits(self, shape):
        limits = self.engine.about["shapes"]
        return limits is not None and limits[0][0] <= shape[0] <= limits[2][0]

    def _queue(self, stream_handle, addresses):
        module, engine = self.module, self.engine
        stream = module.cuda.streams[stream_handle]
        shape = self.shape or tuple(engine.session.get_inputs()[0].shape)
        if any(isinstance(size, str) for size in shape):
            module.say("ERROR", "a dynamic shape was not set")
            return False
        if stream.captured is not None and (self.set_up_for != shape or not module.behavior.capturable):
            stream.capture_broken = True  # setting up within a capture breaks it
            return True
        self.set_up_for = shape
        source, to = addresses

        def compute():
            raw = engine.session.get_inputs()[0].type == "tensor(uint8)"
            images = array_at(source, shape, ctypes.c_ubyte if raw else ctypes.c_float)
            outputs = engine.session.run(None, {engine.names[0]: images.copy()})[0]
            array_at(to, outputs.shape)[...] = outputs

        stream.add("net", compute)
        return True


def array_at(address, shape, kind=ctypes.c_float):
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((kind * count).from_address(address)).reshape(shape)


class OldContext(PlainContext):
    def set_binding_shape(self, index, shape):
        self.module.calls.append("set_binding_shape(%d, %s)" % (index, tuple(shape)))
        self.shape = tuple(shape)
        return self._fits(self.shape)

    def execute_async_v2(self, bindings, stream_handle):
        self.module.calls.append("execute_async_v2")
        return self._queue(stream_handle, bindings)


class Context(PlainContext):
    def set_input_shape(self, name, shape):
        self.module.calls.append("set_input_shape(%s, %s)" % (name, tuple(shape)))
        self.shape = tuple(shape)
        return self._fits(self.shape)

    def set_tensor_address(self, name, address):
        self.module.calls.append("set_tensor_address(%s)" % name)
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle):
        self.module.calls.append("execute_async_v3")
        return self._queue(stream_handle, [self.addresses[name] for name in self.engine.names])
