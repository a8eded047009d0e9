"""A bundle for trtexec, the commands that edgecl makes of it, and those that a program was started with."""

import json

from edgecl.onboard import trtexec_flags
from edgecl.onboard.bundle import onnx_name
from edgecl.onboard.trtexec_flags import Net, bench_command

STATIC = {"name": "input", "shape": [1, 3, 224, 224], "dynamic_batch": False, "max_batch": 1}
DYNAMIC = {"name": "input", "shape": [16, 3, 96, 96], "dynamic_batch": True, "max_batch": 64}
BUILD = {"workspace_mib": 1024, "optimization_level": 5, "tf32": True, "dla_core": None}


def lines(version, precision="fp16", form=None, build=BUILD, manifest_input=STATIC):
    net = Net(manifest_input, build, precision, form or precision, f"model.{precision}.onnx")
    return trtexec_flags.command_lines(version, net, "e.plan")


def bench(version, mode):
    net = Net(STATIC, BUILD, "fp16", "fp16", "model.onnx")
    names = {"times": "t.json", "layers": "l.json"}
    return bench_command(version, net, "e.plan", mode=mode, duration_s=59.5, **names)


def write_bundle(folder):
    path = folder / "bundle with space"
    path.mkdir()
    for name in ("model.onnx", "model.fp16.onnx", "model.int8.onnx"):
        (path / name).write_bytes(name.encode())
    return path


def manifest_of(versions=">=10.3,<10.8", int8="int8-trt", **build):
    forms = {"fp16": "fp16", "int8": int8, "fp32": "fp32"}
    build = {**BUILD, **build}
    precisions = {name: {"model": onnx_name(name), "form": form} for name, form in forms.items()}
    for name, about in precisions.items():
        net = Net(STATIC, build, name, about["form"], about["model"])
        about["trtexec"] = trtexec_flags.command_lines(versions, net, f"{name}.plan")
    return {
        "precision": "fp16",
        "precisions": precisions,
        "input": STATIC,
        "target": {"versions": versions, "build": build},
    }


def calls(program):
    return [json.loads(line) for line in (program.parent / "calls.jsonl").read_text().splitlines()]
