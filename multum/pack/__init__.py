"""The ``.mip`` file: one self-contained file for a model, and the lossless codec of its tensors."""

from multum.pack.coder import decode, encode
from multum.pack.mip import read, read_meta, sizes, write

__all__ = ["decode", "encode", "read", "read_meta", "sizes", "write"]
