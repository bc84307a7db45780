"""What torch can use on this machine: `python -m qwen_image_tool.engine.probe` prints it."""

import os
import platform
import sys
import warnings
from typing import Any

from qwen_image_tool.device import TorchFacts, cpu_name, nvidia_card
from qwen_image_tool.errors import first_line


def torch_facts() -> TorchFacts:
    """Import torch and ask it. Never raises: `error` and `gpu_error` say what does not work.

    The first call on a GPU starts it, which takes about a second and some of its memory.
    """
    if sys.platform == "linux":  # torch has it on no other system; it leaves no holes in the memory
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return TorchFacts(error="it is not installed.")
        return TorchFacts(error=_sentence(error))
    except Exception as error:  # noqa: BLE001  a broken install fails in any way
        return TorchFacts(error=_sentence(error))
    gpu, why = _gpu(torch)
    return TorchFacts(
        version=torch.__version__,
        built_for=_built_for(torch),
        gpu_error=why,
        **(gpu or {"bf16": _cpu_bf16(torch)}),
    )


def _built_for(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"ROCm {'.'.join(torch.version.hip.split('.')[:2])}"
    if getattr(torch.version, "xpu", None):
        return "XPU"
    return "MPS" if torch.backends.mps.is_built() else ""


def _gpu(torch: Any) -> tuple[dict[str, Any], str]:
    """Fields of the first GPU, or nothing and why it can't be used."""
    built_for = _built_for(torch)
    if not built_for:
        card = nvidia_card()
        return {}, f"this torch was built without support for the {card.name}." if card else ""
    reader = {"CUDA": _cuda, "ROCm": _cuda, "XPU": _xpu, "MPS": _mps}[built_for.split()[0]]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            facts = reader(torch)
        except Exception as error:  # noqa: BLE001  drivers fail in any way
            return {}, _sentence(error)
    if facts:
        return facts, ""
    reasons = [str(warning.message).splitlines()[0] for warning in said]
    return {}, (reasons or [f"torch is built for {built_for} and finds no GPU with a driver."])[0]


def _cuda(torch: Any) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    _try_out(torch, "cuda")
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    rocm = bool(torch.version.hip)
    card = None if rocm else nvidia_card()
    return {
        "kind": "rocm" if rocm else "cuda",
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "vram_bytes": total,
        "vram_free_bytes": free,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "capability": properties.gcnArchName if rocm else f"{properties.major}.{properties.minor}",
        "shared_memory": bool(properties.is_integrated),
        "driver": card.driver if card else "",
    }


def _xpu(torch: Any) -> dict[str, Any]:
    if not torch.xpu.is_available():
        return {}
    _try_out(torch, "xpu")
    properties = torch.xpu.get_device_properties(0)
    free, total = torch.xpu.mem_get_info(0)
    return {
        "kind": "xpu",
        "gpu": properties.name,
        "gpus": torch.xpu.device_count(),
        "vram_bytes": total,
        "vram_free_bytes": free,
        "bf16": properties.has_subgroup_matrix_multiply_accumulate,
        "shared_memory": bool(getattr(properties, "is_integrated_gpu", False)),
        "driver": properties.driver_version,
    }


def _mps(torch: Any) -> dict[str, Any]:
    if not torch.backends.mps.is_available():
        return {}
    _try_out(torch, "mps")
    total = torch.mps.recommended_max_memory()
    return {
        "kind": "mps",
        "gpu": cpu_name(),
        "gpus": 1,
        "vram_bytes": total,
        "vram_free_bytes": total - torch.mps.driver_allocated_memory(),
        "bf16": True,  # macOS 14 and later, which this torch needs
        "shared_memory": True,
        "driver": f"macOS {platform.mac_ver()[0]}",
    }


def _try_out(torch: Any, device: str) -> None:
    """A GPU that this build has no kernels for is found, and fails at the first sum."""
    if (torch.ones(2, device=device) + 1).sum().item() != 4:
        raise RuntimeError("it adds one and one wrong")


def _cpu_bf16(torch: Any) -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return bool(torch.cpu._is_avx512_bf16_supported())
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _sentence(error: Exception) -> str:
    return first_line(error).rstrip(".") + "."


if __name__ == "__main__":
    sys.stdout.write(torch_facts().to_json() + "\n")
