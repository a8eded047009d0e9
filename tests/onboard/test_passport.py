"""What a device is, read from fake trees of a server and two boards."""

import pytest

from edgecl.onboard.passport import read_passport

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


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def read(root, machine="aarch64", cores=4):
    versions = {"onnxruntime": "1.20.0", "numpy": "1.26.0"}
    return read_passport(threads=2, versions=versions, root=root, machine=machine, cores=cores)


@pytest.fixture
def server(tmp_path):
    return tree(
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
    passport = read(server, machine="x86_64", cores=6)
    assert passport.pop("python")
    assert passport == {
        "name": "Intel Xeon Gold 6248",
        "board": None,
        "cpu_model": "Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz",
        "machine": "x86_64",
        "cores": 6,
        "cores_present": 8,
        "core_quota": 2.5,
        "threads": 2,
        "governor": "powersave",
        "load_1m": 0.52,
        "memory_mib": 64000,
        "memory_available_mib": 32000,
        "os": "Debian GNU/Linux 12 (bookworm)",
        "kernel": "6.1.0-18-amd64",
        "l4t": None,
        "versions": {"onnxruntime": "1.20.0", "numpy": "1.26.0"},
    }


def test_raspberry_pi_is_named_after_its_board(tmp_path):
    cpus = "".join(ARM_CPU.format(i, "0x41", "0xd08") for i in range(4))
    tree(
        tmp_path,
        {
            "proc/cpuinfo": cpus + "Hardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
            "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\x00",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
    )
    passport = read(tmp_path)
    assert passport["name"] == passport["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert passport["cpu_model"] == "Cortex-A72"
    assert passport["cores_present"] == 4
    assert passport["governor"] == "ondemand"
    assert passport["core_quota"] is None


def test_jetson_orin_tells_its_release(tmp_path):
    cpus = "".join(
        ARM_CPU.format(i, "0x41", "0xd42").replace(
            "BogoMIPS", "model name\t: ARMv8 Processor rev 1 (v8l)\nBogoMIPS"
        )
        for i in range(6)
    )
    tree(
        tmp_path,
        {
            "proc/cpuinfo": cpus,
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\x00",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
        },
    )
    passport = read(tmp_path)
    assert passport["name"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert passport["cpu_model"] == "Cortex-A78AE"
    assert passport["l4t"] == "36.4.3"


def test_cores_of_several_kinds_are_all_named(tmp_path):
    cpus = "".join(ARM_CPU.format(i, "0x41", part) for i, part in enumerate(["0xd0b", "0xd05", "0xd05"]))
    passport = read(tree(tmp_path, {"proc/cpuinfo": cpus + ARM_CPU.format(3, "0x61", "0x022")}))
    assert passport["cpu_model"] == "Cortex-A76 + Cortex-A55 + Arm core 0x61/0x022"


def test_old_control_groups_limit_cores_too(tmp_path):
    files = {"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n"}
    tree(tmp_path, {f"sys/fs/cgroup/cpu/{name}": text for name, text in files.items()})
    assert read(tmp_path)["core_quota"] == 1.5


def test_a_device_that_tells_nothing_still_has_a_name(tmp_path):
    passport = read(tmp_path, machine="riscv64")
    assert passport["name"] == "riscv64"
    assert (
        passport["cpu_model"] is passport["governor"] is passport["load_1m"] is passport["memory_mib"] is None
    )


def test_this_machine_has_a_passport():
    passport = read_passport(threads=1, versions={})
    assert passport["name"]
    assert passport["cores"] >= 1
