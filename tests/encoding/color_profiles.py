"""Color profiles written from the specification (ICC.1:2001-04), and the values that they stand for."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
D50, D65 = (0.9642, 1.0, 0.8249), (0.31271, 0.32902)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_GAMMA = 563 / 256
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def primaries_to_xyz(primaries: Sequence[tuple[float, float]]) -> Array:
    """Return the matrix from linear RGB to XYZ under D65."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    white = np.array([D65[0] / D65[1], 1, (1 - sum(D65)) / D65[1]])
    return np.asarray(columns * np.linalg.solve(columns, white))


def srgb_to_linear(values: ArrayLike) -> Array:
    values = np.asarray(values, dtype=np.float64)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: ArrayLike) -> Array:
    """Encode linear values, clipped to the gamut, in 8 bits."""
    values = np.clip(values, 0, 1)
    return np.round(255 * np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055))


def srgb_to_lab(pixels: ArrayLike) -> Array:
    """Return CIELAB under D50 of sRGB in 8 bits (..., 3)."""
    matrix = adapted(primaries_to_xyz(SRGB))
    ratio = srgb_to_linear(np.asarray(pixels) / 255) @ matrix.T / np.array(D50)
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def adapted(matrix: Array) -> Array:
    """Adapt a matrix to XYZ from D65 to D50 (Bradford)."""
    gains = (BRADFORD @ np.array(D50)) / (BRADFORD @ matrix.sum(axis=1))
    return np.asarray(np.linalg.inv(BRADFORD) @ np.diag(gains) @ BRADFORD @ matrix)


def matrix_profile(primaries: Sequence[tuple[float, float]], curve: bytes) -> bytes:
    columns = adapted(primaries_to_xyz(primaries)).T
    tags = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", columns, strict=True)}
    return _profile("mntr", "RGB ", "XYZ ", {**tags, **{f"{name}TRC": curve for name in "rgb"}})


def gray_profile(gamma: float) -> bytes:
    return _profile("mntr", "GRAY", "XYZ ", {"kTRC": gamma_curve(gamma)})


def ink_profile(colors: ArrayLike) -> bytes:
    """Return a profile of CMYK whose 16 combinations of full inks (2, 2, 2, 2, 3) are colors in sRGB of 8 bits."""
    lab = srgb_to_lab(colors).reshape(-1, 3)
    nodes = np.round((lab + np.array([0, 128, 128])) * np.array([652.8, 256, 256])).astype(">u2")
    identity = np.array([0, 65535], dtype=">u2").tobytes()
    head = struct.pack(">4s4x4B9iHH", b"mft2", 4, 3, 2, 0, *(65536 * np.eye(3, dtype=int)).ravel().tolist(), 2, 2)
    return _profile("prtr", "CMYK", "Lab ", {"A2B0": head + 4 * identity + nodes.tobytes() + 3 * identity})


def gamma_curve(gamma: float) -> bytes:
    return struct.pack(">4s4xIH", b"curv", 1, round(gamma * 256))


def srgb_curve() -> bytes:
    values = np.round(65535 * srgb_to_linear(np.linspace(0, 1, 1024))).astype(">u2")
    return struct.pack(">4s4xI", b"curv", len(values)) + values.tobytes()


def _xyz(values: Sequence[float] | Array) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))


def _profile(kind: str, space: str, connection: str, tags: Mapping[str, bytes]) -> bytes:
    tags = {"wtpt": _xyz(D50), **tags}
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name.encode(), offset + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    words = [word.encode() for word in (kind, space, connection)]
    date = (2024, 1, 1, 0, 0, 0)
    head = struct.pack(">I4xI4s4s4s6H4s28x", offset + len(body), 0x02400000, *words, *date, b"acsp")
    return head + _xyz(D50)[8:] + bytes(48) + table + body
