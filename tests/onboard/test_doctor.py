"""What doctor finds, and how it says to mend it: trees of three devices, real modules, real processes."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from edgecl.onboard import doctor as doctor_module
from edgecl.onboard.cuda_checks import check_capability
from edgecl.onboard.device_info import read_device_info
from edgecl.onboard.device_state import check_conditions, highest_power_mode
from edgecl.onboard.doctor import check_runtime, doctor, probe

from .recorded.boards import hwmon, plant
from .tiny_bundle import flip_byte

NANO_POWER = "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=5W >\n< PM_CONFIG DEFAULT=0 >\n"
ORIN_POWER = (
    "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n"
)
MEMORY = "MemTotal: {total} kB\nMemAvailable: {available} kB\nSwapTotal: 2000000 kB\nSwapFree: {swap} kB\n"
ORIN = {
    "runtime": "tensorrt",
    "versions": ">=10.3,<10.8",
    "device": "jetson-orin",
    "precisions": ["fp16", "int8"],
}
NANO = {"runtime": "tensorrt", "versions": ">=8.2,<8.3", "device": "jetson-nano", "precisions": ["fp16"]}


def board(power, mode, gpu, clocks, cpu):
    """The files of a board: its table of power modes, the mode, and the clocks (now, least, most)."""
    folder = "sys/devices/system/cpu/cpu0/cpufreq"
    which = ("cur", "min", "max")
    return {
        "proc/cpuinfo": "processor\t: 0\n",
        "etc/nvpmodel.conf": power,
        "var/lib/nvpmodel/status": f"pmode:{mode}\n",
        f"{folder}/scaling_governor": "schedutil",
        **{f"sys/class/devfreq/{gpu}/{key}_freq": str(hz) for key, hz in zip(which, clocks, strict=True)},
        **{f"{folder}/scaling_{key}_freq": str(khz) for key, khz in zip(which, cpu, strict=True)},
    }


def zone(number, name, now, kind, limit):
    folder = f"sys/class/thermal/thermal_zone{number}"
    values = {"type": name, "temp": now, "trip_point_0_type": kind, "trip_point_0_temp": limit}
    return {f"{folder}/{key}": str(value) for key, value in values.items()}


def orin_files():
    """An Orin Nano as it should be measured."""
    return {
        **board(ORIN_POWER, "0002", "17000000.gpu", (1020000000,) * 3, (1728000,) * 3),
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit Super\x00",
        "proc/meminfo": MEMORY.format(total=7800000, available=6000000, swap=2000000),
        "proc/loadavg": "0.10 0.20 0.30 1/300 999\n",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
        **zone(0, "tj-thermal", 48500, "passive", 99000),
        "sys/class/hwmon/hwmon1/pwm1": "120",
        **hwmon("1-0040", 3, [("VDD_IN", 4968, 1200)]),
    }


@pytest.fixture
def orin(tmp_path):
    return plant(tmp_path / "orin", orin_files())


@pytest.fixture
def nano(tmp_path):
    """A Nano out of the box: desktop, lower power mode, clocks that move, warm, its fan at rest."""
    files = {
        **board(
            NANO_POWER, "0001", "57000000.gpu", (76800000, 76800000, 921600000), (102000, 102000, 1479000)
        ),
        "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\x00",
        "proc/meminfo": MEMORY.format(total=4050000, available=900000, swap=1000000),
        "proc/loadavg": "3.50 2.00 1.00 3/400 999\n",
        "proc/4321/comm": "gnome-shell\n",
        "etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref\n",
        **zone(0, "PMIC-Die", 100000, "critical", 100000),
        **zone(1, "GPU-therm", 71000, "passive", 97000),
        "sys/devices/pwm-fan/cur_pwm": "0",
        "usr/lib/aarch64-linux-gnu/libnvinfer.so.8": "",
    }
    return plant(tmp_path / "nano", files)


def by_name(found):
    checks = {check["name"]: check for check in found["checks"]}
    assert len(checks) == len(found["checks"])
    assert all(check.keys() == {"name", "status", "found", "fix"} for check in found["checks"])
    # Whatever is not well comes with what to do.
    assert all(check["fix"] or check["status"] == "ok" for check in found["checks"])
    return checks


def conditions(root):
    """The checks of a board's state alone, which start no process."""
    device_info = read_device_info(threads=None, versions={}, root=root)
    return {check["name"]: check for check in check_conditions(root, device_info)}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder from which every new Python imports first."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


# --- the state of a board ---


def test_board_made_ready_has_nothing_to_complain_of(orin):
    found = doctor(target={"runtime": "onnxruntime", "device": "cpu"}, root=orin)
    checks = by_name(found)
    expected = {
        "power mode": "MAXN_SUPER",
        "GPU clock": "locked at 1020 MHz",
        "CPU clock": "locked at 1728 MHz",
        "temperature": "48 C at most (tj-thermal)",
        "fan": "at 120 of 255",
        "swap": "0 of 1953 MiB in use",
        "desktop": "none",
        "power rails": "VDD_IN",
    }
    assert {name: checks[name]["found"] for name in expected} == expected
    assert {checks[name]["status"] for name in (*expected, "load")} == {"ok"}
    assert (found["device"]["kind"], found["device"]["l4t"]) == ("jetson-orin-nano", "36.4.3")


def test_board_out_of_the_box_is_told_each_thing_to_do(nano):
    checks = conditions(nano)
    expected = {
        "power mode": ("5W, the highest is MAXN", "sudo nvpmodel -m 0  # MAXN"),
        "GPU clock": ("moves from 77 to 922 MHz", "sudo jetson_clocks"),
        "CPU clock": ("governor schedutil: it follows the load", "sudo jetson_clocks"),
        "fan": ("at rest on a warm board", "sudo jetson_clocks --fan"),
        "swap": ("977 of 1953 MiB in use", "close other programs, or reboot"),
        "desktop": (
            "gnome-shell: it takes memory and GPU time",
            "sudo systemctl isolate multi-user.target  # back: graphical.target",
        ),
    }
    assert {name: (checks[name]["found"], checks[name]["fix"]) for name in expected} == expected
    assert {checks[name]["status"] for name in expected} == {"warn"}
    # The 100 degrees of PMIC-Die are a constant.
    assert checks["temperature"]["status"] == "ok"
    assert checks["temperature"]["found"] == "71 C at most (GPU-therm)"


@pytest.mark.parametrize(
    ("degrees", "status", "found"),
    [
        (88_000, "ok", "88 C at most (tj-thermal)"),
        (91_000, "warn", "tj-thermal is at 91 C, clocks fall at 99 C"),
        (99_500, "fail", "tj-thermal is at 100 C, clocks fall at 99 C"),
    ],
)
def test_heat_near_the_trip_point_warns_and_at_it_fails(orin, degrees, status, found):
    plant(orin, {"sys/class/thermal/thermal_zone0/temp": str(degrees)})
    checks = conditions(orin)
    assert (checks["temperature"]["status"], checks["temperature"]["found"]) == (status, found)


@pytest.mark.parametrize(
    ("table", "number"),
    [
        (ORIN_POWER, 2),
        (NANO_POWER, 0),
        ("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=50W>\n< POWER_MODEL ID=2 NAME=30W >\n", 1),
        ("< POWER_MODEL ID=0 NAME=MODE_15W_6CORE >\n< POWER_MODEL ID=8 NAME=MODE_20W_6CORE >\n", 8),
        ("< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=50W >\n", 0),
        ("< POWER_MODEL ID=0 NAME=120W >\n< POWER_MODEL ID=1 NAME=90W >\n", 0),
    ],
)
def test_highest_power_mode_is_found_by_its_name(table, number):
    assert highest_power_mode(table)[0] == number


def test_server_with_a_lazy_governor_and_a_limit_on_its_cores(tmp_path):
    cpu = "sys/devices/system/cpu/cpu0/cpufreq"
    root = plant(
        tmp_path / "pc",
        {
            "proc/loadavg": "900.0 1 1 1/1 1\n",
            f"{cpu}/scaling_governor": "powersave",
            f"{cpu}/scaling_min_freq": "800000",
            f"{cpu}/scaling_max_freq": "3900000",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
    )
    checks = by_name(doctor(root=root))
    assert checks["CPU clock"]["fix"] == "sudo cpupower frequency-set -g performance"
    assert (checks["load"]["status"], checks["load"]["found"].partition(" ")[0]) == ("warn", "900.00")
    assert checks["core quota"]["found"].startswith("the container grants the time of 0.5 cores and shows ")
    assert not {"desktop", "power rails"} & checks.keys()


@pytest.mark.parametrize(
    ("available_mib", "status", "found"),
    [
        (3000, "ok", "3000 MiB available"),
        (1500, "warn", "1500 MiB available, so the engine builder gets 750 of 1024 MiB"),
        (200, "fail", "200 MiB available"),
    ],
)
def test_memory_is_held_to_the_workspace(orin, available_mib, status, found):
    plant(orin, {"proc/meminfo": MEMORY.format(total=7800000, available=available_mib * 1024, swap=2000000)})
    checks = by_name(doctor(target={**ORIN, "build": {"workspace_mib": 1024}}, root=orin))
    assert (checks["memory"]["status"], checks["memory"]["found"]) == (status, found)


# --- device and precisions ---


def test_device_of_another_kind_than_the_target_fails(nano, orin):
    checks = by_name(doctor(target=ORIN, root=nano))
    assert checks["device"]["status"] == "fail"
    assert checks["device"]["found"] == "Jetson Nano; the target is for any Jetson Orin"
    assert by_name(doctor(target=NANO, root=orin))["device"]["status"] == "fail"
    assert by_name(doctor(target=ORIN, root=orin))["device"]["status"] == "ok"
    cousin = by_name(doctor(target={**ORIN, "device": "jetson-agx-orin"}, root=orin))["device"]
    assert (cousin["status"], cousin["found"]) == (
        "warn",
        "Jetson Orin Nano; the target is for Jetson AGX Orin",
    )


@pytest.mark.parametrize(
    ("precisions", "status", "fix"),
    [
        (["fp16", "int8"], "warn", "run it with --precision fp16"),
        (["int8"], "fail", "export again with --precision fp16"),
    ],
)
def test_int8_on_a_nano_is_a_warning_with_the_precision_to_take_or_a_failure(nano, precisions, status, fix):
    check = by_name(doctor(target={**NANO, "precisions": precisions}, root=nano))["precision"]
    assert (check["status"], check["fix"]) == (status, fix)
    assert check["found"] == "Jetson Nano does not compute int8; it has fp32, fp16"


def test_dla_on_an_orin_nano_fails_and_on_an_agx_orin_does_not(orin):
    dla = {**ORIN, "build": {"dla_core": 1}}
    checks = by_name(doctor(target=dla, root=orin))
    assert checks["DLA"]["status"] == "fail"
    assert checks["DLA"]["found"] == "asked for core 1; Jetson Orin Nano has 0 DLA cores"
    plant(orin, {"proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\x00"})
    assert by_name(doctor(target=dla, root=orin))["DLA"]["status"] == "ok"


# --- runtimes ---


def test_runtime_of_another_version_fails_with_both(orin, modules):
    (modules / "tensorrt.py").write_text("__version__ = '8.5.2.2'")
    checks = by_name(doctor(target=ORIN, root=orin))
    assert checks["tensorrt"]["status"] == "fail"
    assert checks["tensorrt"]["found"] == "8.5.2.2; the target is for >=10.3,<10.8"
    (modules / "tensorrt.py").write_text(
        "__version__ = '10.3.0'  # and a longer file, so that no cache is taken"
    )
    checks = by_name(doctor(target=ORIN, root=orin))
    assert (checks["tensorrt"]["status"], checks["tensorrt"]["found"]) == ("ok", "10.3.0, for >=10.3,<10.8")


def runtime_fix(root, target, *, jetson):
    return {check["name"]: check for check in check_runtime(root, target, jetson=jetson) if check}


def test_bindings_that_are_missing_or_hidden_say_what_to_install(nano, orin, tmp_path, modules, monkeypatch):
    (modules / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.10: cannot open shared object file')"
    )

    def fix(root, target, jetson=True):
        return runtime_fix(root, target, jetson=jetson)["tensorrt"]["fix"]

    check = runtime_fix(nano, NANO, jetson=True)["tensorrt"]
    assert check["status"] == "fail"
    assert check["found"].endswith("libnvinfer.so.10: cannot open shared object file")
    assert check["fix"].startswith("sudo apt install python3-libnvinfer")  # the library is there
    assert fix(orin, ORIN) == "sudo apt install nvidia-jetpack"
    assert fix(tmp_path, ORIN, jetson=False) == "pip install tensorrt"
    plant(nano, {"usr/lib/python3.6/dist-packages/tensorrt/__init__.py": ""})
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert "--system-site-packages" in fix(nano, NANO)
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert fix(nano, NANO) == "the system's own python3 has it: use /usr/bin/python3"


def test_trtexec_is_found_where_jetpack_puts_it(orin, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    missing = runtime_fix(orin, ORIN, jetson=True)["trtexec"]
    assert (missing["status"], missing["fix"]) == ("warn", "sudo apt install libnvinfer-bin")
    program = plant(orin, {"usr/src/tensorrt/bin/trtexec": ""}) / "usr/src/tensorrt/bin/trtexec"
    assert runtime_fix(orin, ORIN, jetson=True)["trtexec"]["found"] == str(program)


def test_machine_without_a_usable_gpu_fails_for_tensorrt(orin):
    check = runtime_fix(orin, ORIN, jetson=True)["CUDA"]
    if check["status"] == "ok":
        pytest.skip("this machine has a GPU that CUDA can use")
    assert check["found"].startswith(("no CUDA runtime found", "no GPU that CUDA can use"))
    assert check["fix"]


def test_gpu_that_the_engines_are_not_compiled_for_fails():
    target = {"runtime": "tensorrt_rtx", "build": {"compute_capabilities": ["SM86", "SM120"]}}
    assert check_capability("8.6", target)["status"] == "ok"
    assert check_capability("12.0", target)["status"] == "ok"
    check = check_capability("9.0", target)
    assert (check["status"], check["found"]) == ("fail", "SM90; the engines are for SM86, SM120")
    assert check_capability("9.0", {"runtime": "tensorrt"}) is None


def test_module_that_kills_python_is_told_from_one_that_is_missing(modules):
    (modules / "tensorrt_rtx_leftover").mkdir()
    assert "but no module in it" in probe("tensorrt_rtx_leftover")["error"]
    (modules / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert probe("numpy") == {"error": "importing it was ended by SIGILL", "crashed": True}
    check = by_name(doctor())["NumPy"]
    assert check["status"] == "fail"
    assert check["fix"].startswith("export OPENBLAS_CORETYPE=ARMV8")


def test_real_runtime_is_seen():
    onnxruntime = pytest.importorskip("onnxruntime")
    checks = by_name(doctor(target={"runtime": "onnxruntime", "versions": ">=1", "device": "cpu"}))
    assert checks["onnxruntime"]["found"] == f"{onnxruntime.__version__}, for >=1"


# --- the bundle ---


def test_whole_bundle_is_ok_here_and_a_flipped_byte_fails(bundle):
    found = doctor(bundle)
    assert found["ok"] is True
    assert by_name(found)["bundle"]["found"] == "2 files match their hashes"
    flip_byte(bundle / "model.onnx")
    found = doctor(bundle)
    assert found["ok"] is False
    assert by_name(found)["bundle"]["found"].startswith("'model.onnx' does not match its hash")


def test_directory_that_is_no_bundle_fails_and_the_rest_is_still_checked(tmp_path):
    checks = by_name(doctor(tmp_path))
    assert checks["bundle"]["status"] == "fail"
    assert "Python" in checks
    assert "runtimes" in checks


def test_full_disk_fails_for_what_the_engines_need(tmp_path, bundle, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10 << 20)
    monkeypatch.setattr(doctor_module.shutil, "disk_usage", lambda place: usage)
    check = by_name(doctor(bundle))["disk"]
    assert (check["status"], check["found"]) == ("fail", "10 MiB free for 64")
    assert str(bundle) in check["fix"]


def test_bare_python_without_numpy_is_told_to_install_it(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-m", "edgecl.onboard", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(doctor_module.__file__).parents[2],
    )
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["NumPy"]["found"].endswith("No module named 'numpy'")
    assert checks["NumPy"]["fix"] == "sudo apt install python3-numpy"
