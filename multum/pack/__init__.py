"""The `.mip` file: one self-contained file for a model, and the lossless codec of its tensors."""

from .coder import decode, encode
from .limits import limits
from .mip import read, read_meta, sizes, write
from .model import describe, load, save
from .onnx import pack, unpack

__all__ = ["decode", "describe", "encode", "limits", "load", "pack", "read", "read_meta", "save", "sizes", "unpack", "write"]
