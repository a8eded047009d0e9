"""Power monitors of the boards: files under /sys, lines of tegrastats, and what they add up to.

Each monitor file is 'mV' and 'mA' of a channel (INA3221 under hwmon) or 'mW' (under iio, JetPack 4).
"""

from pathlib import Path
from typing import NamedTuple


class Board(NamedTuple):
    files: dict[str, str]  # path -> content
    line: str  # of tegrastats
    rails: tuple[str, ...]  # that make up the module
    sysfs_w: float
    line_w: float


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write files below a root, and return it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def hwmon(device: str, number: int, channels: list[tuple[str, int, int]]) -> dict[str, str]:
    """The files of one INA3221 of newer kernels; (label, mV, mA) of each channel."""
    folder = f"sys/bus/i2c/drivers/ina3221/{device}/hwmon/hwmon{number}"
    files = {f"{folder}/name": "ina3221\n"}
    for channel, (label, millivolts, milliamperes) in enumerate(channels, start=1):
        files[f"{folder}/in{channel}_label"] = f"{label}\n"
        files[f"{folder}/in{channel}_input"] = f"{millivolts}\n"
        files[f"{folder}/curr{channel}_input"] = f"{milliamperes}\n"
    # A sum of shunt voltages, which is no power rail: it has a label and no such current.
    files[f"{folder}/in7_label"] = "sum of shunt voltages\n"
    files[f"{folder}/in7_input"] = "12\n"
    return files


def iio(device: str, number: int, channels: list[tuple[str, int]]) -> dict[str, str]:
    """The files of one INA3221 of JetPack 4; (name, mW) of each channel."""
    folder = f"sys/bus/i2c/drivers/ina3221x/{device}/iio:device{number}"
    files = {f"{folder}/name": "ina3221x\n"}
    for channel, (label, milliwatts) in enumerate(channels):
        files[f"{folder}/rail_name_{channel}"] = f"{label}\n"
        files[f"{folder}/in_power{channel}_input"] = f"{milliwatts}\n"
        files[f"{folder}/in_voltage{channel}_input"] = "5000\n"
    return files


BOARDS = {
    "nano": Board(
        iio("6-0040", 0, [("POM_5V_IN", 3842), ("POM_5V_GPU", 452), ("POM_5V_CPU", 1130)]),
        "RAM 1170/3956MB (lfb 496x4MB) SWAP 0/1978MB (cached 0MB) IRAM 0/252kB(lfb 252kB) "
        "CPU [20%@1479,21%@1479,33%@1479,29%@1479] EMC_FREQ 0% GR3D_FREQ 34% PLL@38C CPU@39.5C PMIC@100C GPU@39C "
        "AO@46C thermal@38.75C POM_5V_IN 3851/3129 POM_5V_GPU 160/160 POM_5V_CPU 922/922",
        ("POM_5V_IN",),
        3.842,
        3.851,
    ),
    "xavier-nx": Board(
        hwmon("1-0040", 3, [("VDD_IN", 4960, 1432), ("VDD_CPU_GPU_CV", 4952, 480), ("VDD_SOC", 4960, 292)]),
        "RAM 2956/7765MB (lfb 18x4MB) SWAP 0/3882MB (cached 0MB) CPU [10%@1190,20%@1190,off,off,30%@1190,0%@1190] "
        "EMC_FREQ 0%@1600 GR3D_FREQ 45%@611 VIC_FREQ 0%@115 APE 150 MTS fg 0% bg 0% AO@35C GPU@35.5C PMIC@50C "
        "AUX@35C CPU@36C thermal@35.4C VDD_IN 7102/5204 VDD_CPU_GPU_CV 2380/720 VDD_SOC 1448/1087",
        ("VDD_IN",),
        4960 * 1432 / 1e6,
        7.102,
    ),
    "agx-xavier": Board(
        {
            **iio("1-0040", 0, [("GPU", 4667), ("CPU", 1245), ("SOC", 2489)]),
            **iio("1-0041", 1, [("CV", 0), ("VDDRQ", 1090), ("SYS5V", 3152)]),
        },
        "RAM 3810/31920MB (lfb 6441x4MB) SWAP 0/15960MB (cached 0MB) CPU [0%@1190,1%@1190,0%@1190,0%@1189,off,off,off,off] "
        "EMC_FREQ 0%@1331 GR3D_FREQ 0%@114 VIC_FREQ 115 APE 150 AUX@36C CPU@36.5C thermal@35.7C Tboard@37C AO@35C "
        "GPU@35C Tdiode@38.75C PMIC@50C GPU 467mW/467mW CPU 467mW/467mW SOC 1245mW/1245mW CV 0mW/0mW "
        "VDDRQ 311mW/311mW SYS5V 2768mW/2768mW",
        ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
        12.643,
        5.258,
    ),
    "orin-nano": Board(
        hwmon("1-0040", 1, [("VDD_IN", 4984, 1120), ("VDD_CPU_GPU_CV", 4976, 264), ("VDD_SOC", 4976, 296)]),
        "11-20-2026 12:34:56 RAM 2840/7620MB (lfb 512x4MB) SWAP 0/3810MB (cached 0MB) "
        "CPU [25%@1420,off,off,20%@1420,22%@1420,18%@1420] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305,0] NVDEC off NVJPG off "
        "VIC off OFA off APE 200 cpu@46.812C soc2@45.781C soc0@46.218C gpu@47.156C tj@47.156C soc1@46.25C "
        "VDD_IN 5765mW/5532mW VDD_CPU_GPU_CV 1548mW/1310mW VDD_SOC 1497mW/1470mW",
        ("VDD_IN",),
        4984 * 1120 / 1e6,
        5.765,
    ),
    "agx-orin": Board(
        {
            **hwmon(
                "1-0040",
                2,
                [("VDD_GPU_SOC", 19928, 160), ("VDD_CPU_CV", 19936, 40), ("VIN_SYS_5V0", 5008, 600)],
            ),
            **hwmon("1-0041", 3, [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 104), ("NC", 0, 0)]),
        },
        "11-14-2026 12:34:56 RAM 3162/30536MB (lfb 6x4MB) SWAP 0/15268MB (cached 0MB) CPU [1%@729,0%@729,off,off] "
        "EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] cpu@47.968C soc0@46.906C gpu@46.343C tj@47.968C "
        "VDD_GPU_SOC 3175mW/3100mW VDD_CPU_CV 800mW/790mW VIN_SYS_5V0 3000mW/3010mW VDDQ_VDD2_1V8AO 502mW/502mW",
        ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
        (19928 * 160 + 19936 * 40 + 5008 * 600) / 1e6,
        6.975,
    ),
    "thor": Board(
        {
            # The idle GPU reads a little below nothing, an offset of the monitor.
            **hwmon(
                "2-0040",
                4,
                [("VDD_GPU", 11984, -32), ("VDD_CPU_SOC_MSS", 11992, 328), ("VIN_SYS_5V0", 5056, 1002)],
            ),
            "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon5/power1_input": "15004000\n",
        },
        "11-08-2026 21:00:39 RAM 8353/125749MB (lfb 31x4MB) CPU [90%@2601,75%@2601,off,7%@2601] EMC_FREQ 34%@4266 "
        "GR3D_FREQ @[1574,1574,1574] NVENC0_FREQ @1691 VIC off cpu@58.25C/61.75C tj@66.625C/66.625C "
        "VDD_GPU 37940mW/8660mW/37940mW VDD_CPU_SOC_MSS 30060mW/12281mW/30060mW VIN_SYS_5V0 15486mW/7424mW/15486mW "
        "VIN 124486mW/36487mW/124486mW",
        ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
        (11984 * -32 + 11992 * 328 + 5056 * 1002) / 1e6,
        83.486,
    ),
}
