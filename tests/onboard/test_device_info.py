"""What a device is, read from fake trees of a PC, a server and boards."""

import pytest

from edgecl.onboard import device_info
from edgecl.onboard.device_info import add_state_after, read_clocks, read_device_info, read_temperatures

from .recorded.boards import plant

X86_CPU = """processor\t: {0}
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz
cpu MHz\t\t: 2500.000

"""
ARM_CPU = """processor\t: {0}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: {1}
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {2}
CPU revision\t: 3

"""


@pytest.fixture(autouse=True)
def four_cores_of_arm(monkeypatch):
    monkeypatch.setattr(device_info.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(device_info, "available_cores", lambda: 4)


def read(root):
    return read_device_info(threads=2, versions={"onnxruntime": "1.20.0", "numpy": "1.26.0"}, root=root)


@pytest.fixture
def server(tmp_path):
    return plant(
        tmp_path,
        {
            "proc/cpuinfo": "".join(X86_CPU.format(i) for i in range(8)),
            "proc/meminfo": "MemTotal:       65536000 kB\nMemFree: 1 kB\nMemAvailable:   32768000 kB\n",
            "proc/loadavg": "0.52 0.58 0.59 1/977 12345\n",
            "proc/sys/kernel/osrelease": "6.1.0-18-amd64\n",
            "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n',
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "sys/fs/cgroup/cpu.max": "250000 100000\n",
        },
    )


def test_server_is_named_after_its_processor(server):
    found = read(server)
    assert found.pop("python")
    clocks = {"cpu": None, "gpu": None, "emc_mhz": None, "locked": None}
    untold = "board module kind gpu l4t jetpack tensorrt cuda driver power_mode fan"
    assert found == {
        **dict.fromkeys(untold.split()),
        "name": "Intel Xeon Gold 6248",
        "cpu_model": "Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz",
        "machine": "aarch64",
        "cores": 4,
        "cores_present": 8,
        "core_quota": 2.5,
        "threads": 2,
        "governor": "powersave",
        "load_1m": 0.52,
        "memory_mib": 64000,
        "memory_available_mib": 32000,
        "os": "Debian GNU/Linux 12 (bookworm)",
        "kernel": "6.1.0-18-amd64",
        "clocks": {"before": clocks, "after": None},
        "temperatures_c": {"before": {}, "after": None},
        "versions": {"onnxruntime": "1.20.0", "numpy": "1.26.0"},
    }


def test_raspberry_pi_is_named_after_its_board(tmp_path):
    cpus = (
        arm(4, "0xd08")["proc/cpuinfo"] + "Hardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"
    )
    plant(
        tmp_path,
        {
            "proc/cpuinfo": cpus,
            "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\x00",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
    )
    found = read(tmp_path)
    assert found["name"] == found["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert (found["cpu_model"], found["cores_present"]) == ("Cortex-A72", 4)
    assert found["core_quota"] is None


def test_cores_of_several_kinds_are_all_named(tmp_path):
    cpus = "".join(ARM_CPU.format(i, "0x41", part) for i, part in enumerate(["0xd0b", "0xd05", "0xd05"]))
    found = read(plant(tmp_path, {"proc/cpuinfo": cpus + ARM_CPU.format(3, "0x61", "0x022")}))
    assert found["cpu_model"] == "Cortex-A76 + Cortex-A55 + Arm core 0x61/0x022"


def test_old_control_groups_limit_cores_too(tmp_path):
    files = {"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n"}
    plant(tmp_path, {f"sys/fs/cgroup/cpu/{name}": text for name, text in files.items()})
    assert read(tmp_path)["core_quota"] == 1.5


def test_a_device_that_tells_nothing_still_has_a_name(tmp_path):
    found = read(tmp_path)
    assert found["name"] == "aarch64"
    for key in ("cpu_model", "governor", "load_1m", "memory_mib"):
        assert found[key] is None


# --- boards, as their systems show them ---


def nvpmodel(*names):
    modes = [
        f"< POWER_MODEL ID={number} NAME={name} >\nCPU_ONLINE CORE_0 1\n" for number, name in enumerate(names)
    ]
    return "< PARAM TYPE=FILE NAME=CPU_ONLINE >\n" + "".join(modes) + "< PM_CONFIG DEFAULT=0 >\n"


def cpu_clocks(count, current, least, most):
    return {
        f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_{which}_freq": f"{clock}\n"
        for core in range(count)
        for which, clock in (("cur", current), ("min", least), ("max", most))
    }


def gpu_clocks(folder, current, least, most):
    return {
        f"sys/class/devfreq/{folder}/{which}_freq": f"{clock}\n"
        for which, clock in (("cur", current), ("min", least), ("max", most))
    }


def zones(**temperatures):
    found = {}
    for number, (name, degrees) in enumerate(temperatures.items()):
        zone = f"sys/class/thermal/thermal_zone{number}"
        found[f"{zone}/type"] = name.replace("_", "-") + "\n"
        if degrees is not None:
            found[f"{zone}/temp"] = f"{degrees}\n"
    return found


def arm(count, part, implementer="0x41"):
    return {"proc/cpuinfo": "".join(ARM_CPU.format(i, implementer, part) for i in range(count))}


NANO = {
    **arm(4, "0xd07"),
    "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3449-0000-b00+p3448-0000-b00\0nvidia,jetson-nano\0nvidia,tegra210\0",
    "etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64\n",
    "etc/nvpmodel.conf": nvpmodel("MAXN", "5W"),
    "var/lib/nvpmodel/status": "pmode:0000",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.8.2.1": "",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.8": "",
    "usr/local/cuda/version.txt": "CUDA Version 10.2.300\n",
    "sys/devices/pwm-fan/cur_pwm": "120\n",
    "sys/devices/pwm-fan/rpm_measured": "2400\n",
    **cpu_clocks(4, 1479000, 1479000, 1479000),
    **gpu_clocks("57000000.gpu", 921600000, 921600000, 921600000),
    **zones(AO_therm=45500, CPU_therm=38000, GPU_therm=36500, PLL_therm=36000, PMIC_Die=100000),
}
XAVIER_NX = {
    **arm(6, "0x004", "0x4e"),
    "proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3509-0000+p3668-0001\0nvidia,tegra194\0",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n",
    "etc/nvpmodel.conf": nvpmodel(*[f"MODE_{n}" for n in range(8)], "MODE_20W_6CORE"),
    "var/lib/nvpmodel/status": "pmode:0008\n",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.8.5.2": "",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "11.4.19"}}',
    "sys/class/hwmon/hwmon3/name": "pwmfan\n",
    "sys/class/hwmon/hwmon3/pwm1": "77\n",
    **cpu_clocks(6, 1190400, 1190400, 1907200),
    **gpu_clocks("17000000.gv11b", 114750000, 114750000, 1109250000),
    **zones(CPU_therm=41000, GPU_therm=40500, AUX_therm=40000),
}
ORIN_NANO = {
    **arm(6, "0xd42"),
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel/nvpmodel_p3767_0003.conf": nvpmodel("15W", "7W"),
    "etc/nvpmodel.conf": nvpmodel("15W", "25W", "MAXN_SUPER"),
    "var/lib/nvpmodel/status": "pmode:0002",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
    "usr/local/cuda/version.json": '{"cuda": {"version": "12.6.68"}}',
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
    "sys/class/hwmon/hwmon0/pwm1": "255\n",
    "sys/class/hwmon/hwmon2/rpm": "5120\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
    **cpu_clocks(6, 1728000, 1728000, 1728000),
    **gpu_clocks("17000000.gpu", 1020000000, 1020000000, 1020000000),
    **zones(cpu_thermal=50125, gpu_thermal=49875, cv0_thermal=None, soc0_thermal=48000, tj_thermal=50125),
}
AGX_ORIN = {
    **arm(12, "0xd42"),
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 2.1, GCID: 32413640, BOARD: t186ref, EABI: aarch64\n",
    "etc/nvpmodel.conf": nvpmodel("MAXN", "MODE_15W", "MODE_30W", "MODE_50W"),
    "var/lib/nvpmodel/status": "pmode:0003",
    **cpu_clocks(12, 729600, 729600, 2201600),
    **gpu_clocks("17000000.ga10b", 305250000, 305250000, 1300500000),
    **zones(CPU_therm=47968, Tdiode_tegra=46000, tj_therm=47968),
}
THOR = {
    **arm(14, "0xd83"),
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": nvpmodel("MAXN", "120W"),
    "var/lib/nvpmodel/status": "pmode:0001",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.13.3": "",
    "usr/local/cuda/version.json": '{"cuda": {"version": "13.0.48"}}',
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.00  Release Build\n",
    **gpu_clocks("gpu-nvd-0", 700000000, 600000000, 1600000000),
    **gpu_clocks("gpu-gpc-0", 1575000000, 1575000000, 1575000000),
    **zones(tj_thermal=45000),
}


TOLD = "kind module l4t jetpack tensorrt cuda driver cpu_model"
BOARDS = {
    "nano": (
        NANO,
        "jetson-nano p3448-0000 32.7.1 4.6.1 8.2.1 10.2.300 None Cortex-A57",
        (0, "MAXN"),
        (120, 2400),
    ),
    "xavier-nx": (
        XAVIER_NX,
        "jetson-xavier p3668-0001 35.4.1 5.1 8.5.2 11.4.19 None Carmel",
        (8, "MODE_20W_6CORE"),
        (77, None),
    ),
    "orin-nano": (
        ORIN_NANO,
        "jetson-orin-nano p3767-0005 36.4.3 6.1 10.3.0 12.6.68 540.4.0 Cortex-A78AE",
        (2, "MAXN_SUPER"),
        (255, 5120),
    ),
    "agx-orin": (
        AGX_ORIN,
        "jetson-agx-orin p3701-0005 35.2.1 5.1 None None None Cortex-A78AE",
        (3, "MODE_50W"),
        None,
    ),
    "thor": (
        THOR,
        "jetson-thor p3834-0008 38.2.0 7.0 10.13.3 13.0.48 580.00 Neoverse-V3AE",
        (1, "120W"),
        None,
    ),
}


@pytest.mark.parametrize(("files", "told", "mode", "fan"), BOARDS.values(), ids=BOARDS)
def test_board_tells_what_it_is_and_how_it_is_set(tmp_path, files, told, mode, fan):
    found = read(plant(tmp_path, files))
    assert " ".join(str(found[key]) for key in TOLD.split()) == told
    assert found["power_mode"] == dict(zip(("id", "name"), mode, strict=True))
    assert found["fan"] == (fan and dict(zip(("pwm", "rpm"), fan, strict=True)))


@pytest.mark.parametrize(
    ("board", "mhz"),
    [
        ("nano", (921.6, 921.6, 921.6)),
        ("xavier-nx", (114.75, 114.75, 1109.25)),
        ("orin-nano", (1020.0, 1020.0, 1020.0)),
        ("agx-orin", (305.25, 305.25, 1300.5)),
        ("thor", (1575.0, 1575.0, 1575.0)),
    ],
)
def test_board_tells_its_clocks(tmp_path, board, mhz):
    clocks, locked = read_clocks(plant(tmp_path, BOARDS[board][0])), mhz[1] == mhz[2]
    assert clocks["gpu"] == dict(zip(("mhz", "min_mhz", "max_mhz", "locked"), (*mhz, locked), strict=True))
    assert clocks["locked"] is locked


def test_clocks_of_processor_and_memory_are_told(tmp_path):
    clocks = read_clocks(plant(tmp_path, ORIN_NANO))
    assert clocks["cpu"] == {"mhz": [1728.0] * 6, "min_mhz": 1728.0, "max_mhz": 1728.0, "locked": True}
    assert clocks["emc_mhz"] == 3199.0


def test_one_core_whose_clock_may_change_is_not_locked(tmp_path):
    files = {**ORIN_NANO, "sys/devices/system/cpu/cpu3/cpufreq/scaling_min_freq": "729600\n"}
    clocks = read_clocks(plant(tmp_path, files))
    assert (clocks["cpu"]["locked"], clocks["gpu"]["locked"], clocks["locked"]) == (False, True, False)


def test_temperatures_leave_out_constants_and_zones_that_are_off(tmp_path):
    nano = read_temperatures(plant(tmp_path / "nano", NANO))
    assert nano == {"AO-therm": 45.5, "CPU-therm": 38.0, "GPU-therm": 36.5, "PLL-therm": 36.0}
    orin = read_temperatures(plant(tmp_path / "orin", ORIN_NANO))
    assert orin == {"cpu-thermal": 50.1, "gpu-thermal": 49.9, "soc0-thermal": 48.0, "tj-thermal": 50.1}


def test_zones_of_the_same_name_are_both_told(tmp_path):
    files = {"type": "acpitz\n", "temp": "20000\n"}
    plant(
        tmp_path, {f"sys/class/thermal/thermal_zone{n}/{name}": files[name] for n in (0, 1) for name in files}
    )
    assert read_temperatures(tmp_path) == {"acpitz": 20.0, "acpitz (thermal_zone1)": 20.0}


def test_state_after_is_added_beside_the_state_before(tmp_path):
    found = read(plant(tmp_path, NANO))
    plant(tmp_path, {**zones(AO_therm=52000), **gpu_clocks("57000000.gpu", 614400000, 921600000, 921600000)})
    add_state_after(found, tmp_path)
    assert found["temperatures_c"]["before"]["AO-therm"] == 45.5
    assert found["temperatures_c"]["after"]["AO-therm"] == 52.0
    assert found["clocks"]["before"]["gpu"]["mhz"] == 921.6
    assert found["clocks"]["after"]["gpu"]["mhz"] == 614.4


def test_the_table_of_this_board_may_be_a_link_and_the_runtimes_own_version_counts(tmp_path):
    table = "nvpmodel/nvpmodel_p3767_0005_super.conf"
    plant(tmp_path, {**ORIN_NANO, f"etc/{table}": nvpmodel("15W", "25W", "MAXN_SUPER")})
    (tmp_path / "etc/nvpmodel.conf").unlink()
    (tmp_path / "etc/nvpmodel.conf").symlink_to(table)
    found = read_device_info(threads=1, versions={"tensorrt": "10.4.0"}, root=tmp_path)
    assert found["power_mode"] == {"id": 2, "name": "MAXN_SUPER"}
    assert found["tensorrt"] == "10.4.0"


def test_a_mode_that_tables_of_several_boards_call_differently_has_no_name(tmp_path):
    tables = {"a": nvpmodel("MAXN", "10W"), "b": nvpmodel("15W", "10W")}
    plant(tmp_path, {f"etc/nvpmodel/{name}.conf": text for name, text in tables.items()})
    plant(tmp_path, {"var/lib/nvpmodel/status": "pmode:0000"})
    assert read(tmp_path)["power_mode"] == {"id": 0, "name": None}
    plant(tmp_path, {"var/lib/nvpmodel/status": "pmode:0001"})
    assert read(tmp_path)["power_mode"] == {"id": 1, "name": "10W"}


def test_pc_with_a_graphics_card_names_it_and_its_driver(tmp_path):
    plant(
        tmp_path,
        {
            "proc/cpuinfo": X86_CPU.format(0),
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n",
            "proc/driver/nvidia/gpus/0000:41:00.0/information": "Model: \t\t NVIDIA RTX A4000\nIRQ:   \t\t 153\n",
            "usr/lib/x86_64-linux-gnu/libnvinfer.so.10.9.0": "",
            "usr/lib/x86_64-linux-gnu/libnvinfer.so.10.13.0": "",
            "usr/local/cuda/version.json": "not json",
        },
    )
    found = read(tmp_path)
    assert found["gpu"] == ["NVIDIA RTX A4000"]
    assert found["driver"] == "535.183.01"
    assert found["tensorrt"] == "10.13.0"
    assert found["cuda"] is None
    assert found["kind"] is found["jetpack"] is found["power_mode"] is None
