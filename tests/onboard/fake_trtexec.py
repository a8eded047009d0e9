"""A program that takes trtexec's flags as one version of it does, writes its files and prints its log.

Which flags a version takes is written down here on its own, from the sources of trtexec, and not from edgecl.
"""

import sys
from pathlib import Path

EVERYWHERE = (
    "onnx saveEngine loadEngine shapes minShapes optShapes maxShapes warmUp duration iterations avgRuns percentile "
    "useSpinWait useCudaGraph noDataTransfers separateProfileRun exportTimes exportLayerInfo noTF32 profilingVerbosity "
    "timingCacheFile device help useDLACore allowGPUFallback "
)
FROM_8_6 = EVERYWHERE + "memPoolSize skipInference infStreams builderOptimizationLevel "
FROM_11 = FROM_8_6 + "noCudaGraph includeDataTransfers noSpinWait "
FLAGS = {
    "8.2.1": EVERYWHERE + "workspace buildOnly streams fp16 int8",
    "8.5.2": EVERYWHERE + "memPoolSize buildOnly streams fp16 int8",
    "8.6.2": FROM_8_6 + "fp16 int8",
    "10.3.0": FROM_8_6 + "fp16 int8 stronglyTyped",
    "10.13.3": FROM_8_6 + "fp16 int8 stronglyTyped",
    "11.1.0": FROM_11,
    "11.4.1": FROM_11 + "adjustForDLA",
}

_PROGRAM = """\
#!%(python)s -S
import json, os, signal, sys, time
VERSION, FLAGS, FAULT, COMPUTE_MS, QUERY = %(version)r, %(flags)r, %(fault)r, %(compute_ms)r, %(query)r
HERE = os.path.dirname(os.path.abspath(__file__))
major, minor, patch = (int(part) for part in VERSION.split("."))
BANNER = ("[TensorRT v%%d%%d%%02d]" %% (major, minor, patch) if major < 9 else
          "[TensorRT v%%d%%02d%%02d] [b26]" %% (major, minor, patch))

def say(kind, text):
    print("[11/20/2026-10:00:00] [%%s] %%s" %% (kind, text), flush=True)

def end(word, status):
    print("&&&& %%s TensorRT.trtexec %%s # %%s" %% (word, BANNER, " ".join(sys.argv)), flush=True)
    sys.exit(status)

print("&&&& RUNNING TensorRT.trtexec %%s # %%s" %% (BANNER, " ".join(sys.argv)), flush=True)
with open(os.path.join(HERE, "calls.jsonl"), "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
options = dict((word[2:].split("=", 1) + [None])[:2] for word in sys.argv[1:])
unknown = [word for word in sys.argv[1:] if word[2:].split("=")[0] not in FLAGS]
if unknown:
    say("E", "Unknown option: %%s " %% unknown[0].replace("=", " ", 1))
    print("=== Model Options ===")
    end("FAILED", 1)
if "help" in options:
    print("=== Model Options ===")
    end("PASSED", 0)
say("I", "TensorRT version: " + VERSION)
if "stronglyTyped" in options and ("fp16" in options or "int8" in options):
    say("E", "Invalid usage, setting int8/fp16/bf16 mode is not allowed if graph is strongly typed.")
    end("FAILED", 1)
if major == 8 and minor < 6 and "," in (options.get("percentile") or ""):
    say("E", "--percentile takes one number here")
    end("FAILED", 1)
if "onnx" in options:
    open(options["onnx"], "rb").close()
    if FAULT == "parse":
        for line in ("[TRT] ModelImporter.cpp:726: While parsing node number 12 [HardSwish]:", "Parsing model failed",
                     "Failed to create engine from model or file.", "Engine set up failed"):
            say("E", line)
        end("FAILED", 1)
    if FAULT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    # The types of the graph, which the name of the file tells, or what the flags allow; both agree here.
    name = os.path.basename(options["onnx"])
    kind = "Int8" if "int8" in name else "Half" if "fp16" in name else "Float"
    with open(options["saveEngine"], "wb") as plan:
        plan.write(("plan of %%s in %%s" %% (VERSION, kind)).encode())
    say("I", "Engine built in 1.5 sec.")
    end("PASSED", 0)
plan = open(options["loadEngine"], "rb").read()
if not plan.startswith(b"plan of " + VERSION.encode()):  # a byte changed further on goes unnoticed
    say("E", "Error[1]: [stdArchiveReader.cpp::StdArchiveReader::40] Version tag does not match.")
    say("E", "Engine deserialization failed")
    end("FAILED", 1)
if FAULT == "hang":
    time.sleep(60)
graph = "noCudaGraph" not in options if major >= 11 else "useCudaGraph" in options
transfers = "includeDataTransfers" in options if major >= 11 else "noDataTransfers" not in options
if FAULT == "capture" and graph:
    say("W", "The CUDA graph capture on the stream has failed.")
say("I", "Starting inference")
time.sleep(0.02)
begin = time.monotonic()
count = int(options["iterations"])
time.sleep(0.05)
seconds = time.monotonic() - begin
at, queries = 0.0, []
for i in range(count):
    compute = COMPUTE_MS[i %% len(COMPUTE_MS)] + (0.0 if graph else 0.5)
    enqueue = 0.01 if graph else 0.9 * compute
    h2d, d2h = (0.25, 0.125) if transfers else (0.0, 0.0)
    values = [at, at + enqueue, at, at + h2d, at + h2d, at + h2d + compute, at + h2d + compute,
              at + h2d + compute + d2h, h2d, compute, d2h, h2d + compute + d2h]
    queries.append(dict(zip(QUERY, values)))
    at += h2d + compute + d2h
if FAULT != "no times":
    with open(options["exportTimes"], "w") as file:
        json.dump(queries, file)
if "exportLayerInfo" in options and FAULT != "no layers":
    def layer(kind):
        return {"Name": "a", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": kind}],
                "Outputs": [{"Format/Datatype": kind}], "Weights": {"Type": kind, "Count": 9}}
    kind = {"only float": "Float", "only half": "Half"}.get(FAULT, plan.decode().rpartition(" ")[2])
    layers = [layer(kind), layer(kind), layer("Half" if FAULT == "only half" else "Float")]
    with open(options["exportLayerInfo"], "w") as file:
        json.dump({"Layers": ["a", "b"] if FAULT == "only names" else layers, "Bindings": []}, file)
say("I", "Warmup completed 73 queries over 2000 ms")
say("I", "Timing trace has %%d queries over %%g s" %% (count, seconds))
say("I", "Throughput: 500.5 qps")
end("PASSED", 0)
"""

QUERY = (
    "startEnqMs endEnqMs startH2dMs endH2dMs startComputeMs endComputeMs "
    "startD2hMs endD2hMs h2dMs computeMs d2hMs latencyMs"
)


def make_trtexec(
    folder: Path, version: str, *, fault: str = "", compute_ms: tuple[float, ...] = (2.0, 2.01)
) -> Path:
    """Write the program; `fault` is what goes wrong, `compute_ms` what the queries take, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trtexec"
    filled = {"python": sys.executable, "version": version, "flags": FLAGS[version].split(), "fault": fault}
    path.write_text(_PROGRAM % {**filled, "compute_ms": compute_ms, "query": QUERY.split()})
    path.chmod(0o755)
    return path
