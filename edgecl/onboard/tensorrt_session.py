"""A session of TensorRT or TensorRT for RTX on the first GPU; an engine that is built here is kept in the bundle."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from . import cudart
from .bundle import (
    choose_precision,
    engine_name,
    input_dtype,
    is_plain_file,
    read_plain,
    sha256_of_file,
    slug,
    write_whole,
)
from .engine import TYPES, build_plan, import_runtime, log_of, made
from .errors import BundleError, DeviceError
from .layers import check_delivered, layers_of_engine, precision_shares, summarize
from .runtime import Report
from .runtimes import RUNTIMES

if TYPE_CHECKING:
    import tensorrt

ENGINES = "engines"
"""The folder of a bundle where engines built on a device are kept."""

COMPUTE, TRANSFERS, GRAPH = "compute", "with transfers", ", CUDA graph"


Engine = Tuple[Any, Dict[str, Any]]
"""A loaded engine, and what the record says of it."""


class TensorrtSession:
    """An engine of 'tensorrt' or 'tensorrt_rtx', its buffers and a stream; `threads` is only recorded.

    Raises:
        DeviceError: no TensorRT, no GPU, an engine for another version or GPU, or one that cannot be built.
        BundleError: the file's input or output is not the one of the manifest.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Dict[str, Any],
        *,
        precision: str,
        threads: int,
        runtime: str = "tensorrt",
        report: Optional[Report] = None,
    ) -> None:
        self._trt = import_runtime(runtime)
        self._log = log_of(self._trt)
        self._title = "%s %s" % (RUNTIMES[runtime].title, self._trt.__version__)
        self._runtime_name = runtime
        self._precision, about = choose_precision(manifest, precision)
        self._threads = threads
        self._form = manifest["input"]
        self._most = int(self._form["max_batch"] if self._form["dynamic_batch"] else self._form["shape"][0])
        self._dtype = np.dtype(input_dtype(manifest))
        self._image_bytes = self._dtype.itemsize * int(np.prod(self._form["shape"][1:]))
        self._width = int(manifest["output"]["shape"][1])
        # What to free, the newest first, and by which function; also where making the rest fails.
        self._held: List[Tuple[str, int]] = []
        self._context: Any = None
        self._graphs: Dict[str, int] = {}
        self._notes: List[str] = []
        self._report = report or (lambda line: None)
        self._bound: Optional[int] = None
        self.cuda = cudart.Cudart()
        self._gpu = self.cuda.gpu()
        try:
            self._load(Path(bundle), manifest, about)
        except BaseException:
            self.close()
            raise

    # --- loading ---

    def _load(self, bundle: Path, manifest: Dict[str, Any], about: Dict[str, Any]) -> None:
        self._loader: Any = self._made(lambda: self._trt.Runtime(self._log.logger), "a runtime")
        build = (manifest.get("target") or {}).get("build") or {}
        core = build.get("dla_core")
        if core is not None and self._precision != "fp32" and self._runtime_name == "tensorrt":
            self._loader.DLA_core = core
        self._engine, self._about_engine = (
            self._carried_engine(bundle, about)
            if self._runtime_name == "tensorrt_rtx"
            else self._engine_of_device(bundle, about, build)
        )
        self._names = self._tensor_names(about["model"])
        self._context = self._made(self._engine.create_execution_context, "an execution context")
        most, image_bytes = self._most, self._image_bytes
        self._stream = self._hold("cudaStreamDestroy", "cudaStreamCreateWithFlags", cudart.NON_BLOCKING)
        self._events = [self._hold("cudaEventDestroy", "cudaEventCreate") for _ in range(2)]
        self._device_in = self._hold("cudaFree", "cudaMalloc", most * image_bytes)
        self._device_out = self._hold("cudaFree", "cudaMalloc", 4 * most * self._width)
        self._host_in = self._hold("cudaFreeHost", "cudaHostAlloc", most * image_bytes, 0)
        self._host_out = self._hold("cudaFreeHost", "cudaHostAlloc", 4 * most * self._width, 0)

    def _hold(self, free: str, make: str, *arguments: int) -> int:
        handle = self.cuda.make(make, *arguments)
        self._held.append((free, handle))
        return handle

    def _made(self, make: Callable[[], Any], what: str) -> Any:
        self._log.forget()
        return made(make, what, self._title, self._log)

    def _cannot(self, what: str) -> DeviceError:
        return DeviceError(
            "%s cannot %s: %s" % (self._title, what, self._log.last()),
            "free memory on the GPU, or look at `onboard.pyz doctor`",
        )

    def _engine_of_device(self, bundle: Path, about: Dict[str, Any], build: Dict[str, Any]) -> Engine:
        """Return the engine kept for this device and version, or build it and keep it."""
        model = bundle / about["model"]
        # Whatever decides the plan is in its name: the device, the version, the graph, how it is built.
        recipe = json.dumps([sha256_of_file(model), about["form"], build, self._form], sort_keys=True)
        made_for = "%s sm%s %dmp tensorrt %s %s" % (
            self._gpu.name,
            self._gpu.compute_capability.replace(".", ""),
            self._gpu.multiprocessors,
            self._trt.__version__,
            hashlib.sha256(recipe.encode("ascii")).hexdigest()[:12],
        )
        plan_file = bundle / ENGINES / engine_name(self._precision, made_for)
        kept, problem = self._kept_engine(plan_file)
        if kept is not None:
            return kept
        if problem:
            self._say("building '%s' again: %s" % (plan_file.name, problem))
        cache_file = plan_file.parent / ("timing-%s.cache" % slug(made_for.rpartition(" ")[0]))
        built = build_plan(
            model,
            runtime=self._runtime_name,
            precision=self._precision,
            form=about["form"],
            build=build,
            input_form=self._form,
            free_bytes=cudart.available_bytes(self.cuda, self._gpu),
            timing_cache=cache_file.read_bytes() if is_plain_file(cache_file) else None,
            report=self._report,
        )
        engine = self._deserialize(built.plan)
        if engine is None:
            raise self._cannot("load the engine it just built")
        layers = layers_of_engine(self._trt, engine) or built.layers
        shares, expected = precision_shares(layers), built.network["shares"].get(self._precision, 1.0)
        checked = check_delivered(shares, self._precision, expected=expected, maker=self._title)
        if not checked:
            self._say("the engine does not tell the precision of its layers")
        record: Dict[str, Any] = {
            "file": "%s/%s" % (ENGINES, plan_file.name),
            "sha256": hashlib.sha256(built.plan).hexdigest(),
            "size_bytes": len(built.plan),
            "build_s": round(built.seconds, 3),
            "precision_checked": checked,
            "settings": built.settings,
            "network": built.network,
            "warnings": built.warnings,
        }
        record.update(summarize(layers))
        words = ["%d layers in %s" % (number, name) for name, number in record["layers"].items()]
        self._report("built in %.0f s: %s" % (built.seconds, ", ".join(words)))
        try:
            plan_file.parent.mkdir(exist_ok=True)
            write_whole(plan_file, built.plan)
            write_whole(plan_file.with_suffix(".json"), json.dumps(record, sort_keys=True).encode("ascii"))
            if built.timing_cache:
                write_whole(cache_file, built.timing_cache)
        except OSError as exc:
            record["file"] = None
            self._say("the engine is not kept: %s" % exc)
        return engine, dict(record, cached=False)

    def _kept_engine(self, plan_file: Path) -> Tuple[Optional[Engine], str]:
        """Return the engine in a file, or None and what is wrong with it, which is nothing where there is none."""
        if not is_plain_file(plan_file):
            return None, ""
        try:
            record = json.loads(read_plain(plan_file.with_suffix(".json")).decode("ascii"))
            plan = plan_file.read_bytes()
            expected = record["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None, "its record is missing or damaged"
        if hashlib.sha256(plan).hexdigest() != expected:
            return None, "the file changed since it was built"
        engine = self._deserialize(plan)
        if engine is None:
            return None, "%s does not load it: %s" % (self._title, self._log.last())
        return (engine, dict(record, cached=True)), ""

    def _carried_engine(self, bundle: Path, about: Dict[str, Any]) -> Engine:
        """Return the engine that a bundle of TensorRT for RTX carries for this GPU."""
        capability = "SM%s" % self._gpu.compute_capability.replace(".", "")
        seen = []
        for name, entry in sorted((about.get("engines") or {}).items()):
            compiled_for = entry.get("compute_capabilities", [])
            seen.append("'%s' (%s for %s)" % (name, entry.get("version"), ", ".join(compiled_for)))
            if entry.get("version") != self._trt.__version__ or capability not in compiled_for:
                continue
            path = bundle / name
            if path.parent != bundle or not is_plain_file(path):
                raise BundleError("'%s' is missing from the bundle" % name)
            plan = path.read_bytes()
            engine = self._deserialize(plan)
            if engine is None:
                raise self._cannot("load '%s'" % name)
            record = {
                "file": name,
                "sha256": hashlib.sha256(plan).hexdigest(),
                "size_bytes": len(plan),
                "build_s": entry.get("compile_s"),
                "cached": True,
                "layers": (entry.get("engine") or {}).get("layers"),
            }
            return engine, record
        raise DeviceError(
            "the bundle carries no %s engine for %s on a GPU of compute capability %s; it has %s"
            % (self._precision, self._title, self._gpu.compute_capability, " and ".join(seen) or "none"),
            "export it for this GPU (build.compute_capabilities) with the same version of tensorrt_rtx, or install the "
            "version it was made with",
        )

    def _deserialize(self, plan: bytes) -> Any:
        self._log.forget()
        return self._loader.deserialize_cuda_engine(plan)

    def _say(self, note: str) -> None:
        self._notes.append(note)
        self._report(note)

    # --- tensors ---

    def _tensor_names(self, model: str) -> List[str]:
        """Return the names of the input and the output, in the order of the engine's bindings before TensorRT 10.

        From 8.5 on tensors are found by name; bindings by number are gone in 10.
        """
        engine = self._engine
        self._by_name = hasattr(engine, "num_io_tensors")
        if self._by_name:
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            inputs = [name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
            kinds = [str(engine.get_tensor_dtype(name)) for name in names]
        else:
            names = [engine.get_binding_name(index) for index in range(engine.num_bindings)]
            inputs = [name for index, name in enumerate(names) if engine.binding_is_input(index)]
            kinds = [str(engine.get_binding_dtype(index)) for index in range(len(names))]
        if inputs != [self._form["name"]] or len(names) != 2:
            raise BundleError(
                "the engine of '%s' has the inputs %s of the tensors %s, the manifest says '%s' and one output"
                % (model, inputs, names, self._form["name"])
            )
        for name, kind in zip(names, kinds):  # noqa: B905
            wanted = TYPES[str(self._dtype) if name in inputs else "float32"]
            if kind.rpartition(".")[2] != wanted:
                raise BundleError(
                    "'%s' of the engine of '%s' is of type %s, the manifest says %s"
                    % (name, model, kind, wanted)
                )
        return names

    def _place(self, batch: int) -> None:
        """Set the batch and the addresses of its tensors."""
        shape = (batch,) + tuple(self._form["shape"][1:])
        context: "tensorrt.IExecutionContext" = self._context
        old: Any = context
        if self._form["dynamic_batch"]:
            name = self._form["name"]
            taken = (
                context.set_input_shape(name, shape)
                if self._by_name
                else old.set_binding_shape(self._names.index(name), shape)
            )
            if not taken:
                raise self._cannot("take a batch of shape %s" % (shape,))
        for name in self._names if self._by_name else ():
            context.set_tensor_address(name, self._address(name))

    def _address(self, name: str) -> int:
        return self._device_in if name == self._form["name"] else self._device_out

    def _enqueue(self) -> None:
        """Queue the net alone."""
        context: "tensorrt.IExecutionContext" = self._context
        old: Any = context
        done = (
            context.execute_async_v3(self._stream)
            if self._by_name
            else old.execute_async_v2([self._address(name) for name in self._names], self._stream)
        )
        if not done:
            raise self._cannot("run the net")

    def _upload(self) -> None:
        size = (self._bound or 0) * self._image_bytes
        self.cuda.call(
            "cudaMemcpyAsync", self._device_in, self._host_in, size, cudart.HOST_TO_DEVICE, self._stream
        )

    def _download(self) -> None:
        size = 4 * (self._bound or 0) * self._width
        self.cuda.call(
            "cudaMemcpyAsync", self._host_out, self._device_out, size, cudart.DEVICE_TO_HOST, self._stream
        )

    # --- running ---

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the outputs (N, F) for images as the manifest's input describes them.

        Raises:
            DeviceError: a batch of another shape than the net takes, or a failure on the GPU.
        """
        self._set_batch(images)
        self._log.forget()
        self._upload()
        self._enqueue()
        self._download()
        self.cuda.call("cudaStreamSynchronize", self._stream)
        return self._outputs()

    def _outputs(self) -> np.ndarray:
        return cudart.array_at(self._host_out, (self._bound or 0, self._width)).copy()

    def _set_batch(self, images: np.ndarray) -> None:
        if self._context is None:
            raise DeviceError("the session is closed", "open another one")
        rest, batch, most = tuple(self._form["shape"][1:]), len(images), self._most
        fits = 1 <= batch <= most if self._form["dynamic_batch"] else batch == most
        if images.ndim != 4 or images.shape[1:] != rest or not fits:
            batches = "1 to %d" % most if self._form["dynamic_batch"] else most
            raise DeviceError(
                "the net takes inputs of shape (%s, %s), not %s"
                % (batches, ", ".join(map(str, rest)), images.shape),
                "give it batches of that shape",
            )
        if self._bound != batch:
            self._drop_graphs()  # captured for another shape
            self._bound = batch
            self._place(batch)
        cudart.array_at(self._host_in, images.shape, self._dtype)[...] = images

    def bind(self, images: np.ndarray) -> None:
        """Keep a batch on the GPU, and capture CUDA graphs of running it.

        A graph that cannot be captured, or computes something else, is left out of `modes` and noted in `describe`.
        """
        expected = self.run(images)  # the first run also sets up what must not be set up within a capture
        self._drop_graphs()
        for mode, queue in ((COMPUTE, self._enqueue), (TRANSFERS, self._queue_all)):
            try:
                executable = self._capture(queue)
            except DeviceError as error:
                self._notes.append("no CUDA graph of '%s': %s" % (mode, error.problem))
                continue
            self._graphs[mode + GRAPH] = executable
            self.cuda.call(
                "cudaMemsetAsync", self._device_out, 0xFF, 4 * len(images) * self._width, self._stream
            )
            self.cuda.call("cudaGraphLaunch", executable, self._stream)
            self._download()
            self.cuda.call("cudaStreamSynchronize", self._stream)
            # NaN, which 0xFF bytes are, equals nothing. Tactics may sum in another order from run to run.
            if not np.allclose(self._outputs(), expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max()):
                self.cuda.call("cudaGraphExecDestroy", self._graphs.pop(mode + GRAPH))
                self._notes.append("no CUDA graph of '%s': launched, it computes something else" % mode)

    def _queue_all(self) -> None:
        self._upload()
        self._enqueue()
        self._download()

    def _capture(self, queue: Callable[[], None]) -> int:
        self.cuda.call("cudaStreamBeginCapture", self._stream, cudart.CAPTURE_THREAD_LOCAL)
        try:
            queue()
        except DeviceError:
            with contextlib.suppress(DeviceError):  # the stream must leave capturing
                self.cuda.call("cudaGraphDestroy", self.cuda.end_capture(self._stream))
            raise
        graph = self.cuda.end_capture(self._stream)
        try:
            return self.cuda.instantiate(graph)
        finally:
            self.cuda.call("cudaGraphDestroy", graph)

    def modes(self) -> List[str]:
        """Return what can be timed, the headline first."""
        every = [COMPUTE + GRAPH, COMPUTE, TRANSFERS + GRAPH, TRANSFERS]
        return [mode for mode in every if not mode.endswith(GRAPH) or mode in self._graphs]

    def run_once(self, mode: str = COMPUTE) -> Optional[float]:
        """Run the bound batch; return the seconds between two events on the GPU, around what the mode names.

        Raises:
            DeviceError: nothing is bound, no such mode, or a failure on the GPU.
        """
        if self._bound is None or mode not in self.modes():
            raise DeviceError(
                "cannot time '%s'; there are %s" % (mode, ", ".join(self.modes())), "bind a batch first"
            )
        start, end = self._events
        self.cuda.call("cudaEventRecord", start, self._stream)
        if mode in self._graphs:
            self.cuda.call("cudaGraphLaunch", self._graphs[mode], self._stream)
        elif mode == COMPUTE:
            self._enqueue()
        else:
            self._queue_all()
        self.cuda.call("cudaEventRecord", end, self._stream)
        return self.cuda.elapsed_s(start, end)

    # --- the record ---

    def describe(self) -> Dict[str, Any]:
        """Return what runs, for the record."""
        runtime, driver = self.cuda.versions()
        return {
            "runtime": "%s %s" % (self._runtime_name, self._trt.__version__),
            "precision": self._precision,
            "threads": self._threads,
            "versions": {
                self._runtime_name: self._trt.__version__,
                "cuda_runtime": runtime,
                "cuda_of_driver": driver,
            },
            "settings": {
                "gpu": self._gpu.name,
                "compute_capability": self._gpu.compute_capability,
                "multiprocessors": self._gpu.multiprocessors,
                "enqueue": "execute_async_v3" if self._by_name else "execute_async_v2",
                "timing": "CUDA events",
                "host_memory": "pinned",
                "streams": 1,
                "modes": self.modes(),
                "notes": list(self._notes),
            },
            "engine": dict(self._about_engine),
        }

    def _drop_graphs(self) -> None:
        while self._graphs:
            self.cuda.call("cudaGraphExecDestroy", self._graphs.popitem()[1])

    def close(self) -> None:
        """Free everything on the GPU; a second call does nothing."""
        self._held += [("cudaGraphExecDestroy", graph) for graph in self._graphs.values()]
        self._graphs = {}
        # TensorRT wants its objects gone in this order, and the memory they use after them.
        self._context = None
        self._engine = None
        self._loader = None
        while self._held:
            # After a failure on the GPU every call fails; what failed first is what counts.
            with contextlib.suppress(DeviceError):
                self.cuda.call(*self._held.pop())
