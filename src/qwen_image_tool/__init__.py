"""QwenImageTool: Alibaba's open Qwen-Image models on the computer you own."""

from importlib.metadata import version

__version__ = version("qwen-image-tool")
