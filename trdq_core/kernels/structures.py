"""The structures that cross the C ABI, field by field as in csrc/abi.h."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from typing import ClassVar


class Rows(Structure):
    """`trdq_rows`: activations, what is done to them before they are quantized, and their grid."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        ("tokens", c_int64),
        ("width", c_int64),
        ("prologue", c_int),
        ("epsilon", c_float),
        ("shift", c_void_p),
        ("factor", c_void_p),
        ("item_rows", c_int64),
        ("inverse_scale", c_void_p),
        ("rotation", c_void_p),
        ("rotation_size", c_int64),
        ("permutation", c_void_p),
        ("hadamard_block", c_int64),
        ("second_rotation", c_void_p),
        ("second_size", c_int64),
        ("bits", c_int),
        ("symmetric", c_int),
        ("static_scale", c_void_p),
        ("static_zero", c_void_p),
        ("clip", c_float),
    ]


class Weight(Structure):
    """`trdq_weight`: one packed weight and where its product goes."""

    _fields_: ClassVar = [
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("data", c_void_p),
        ("bits", c_int),
        ("group_scale", c_void_p),
        ("group_size", c_int64),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("column_sum", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("ldy", c_int64),
    ]


class Residual(Structure):
    """`trdq_residual`: what is added to a product, and the gate it is multiplied by before that."""

    _fields_: ClassVar = [
        ("added", c_void_p),
        ("ld_added", c_int64),
        ("gate", c_void_p),
        ("ld_gate", c_int64),
        ("item_rows", c_int64),
    ]


class Heads(Structure):
    """`trdq_heads`: where queries, keys, values or outputs of an attention lie."""

    _fields_: ClassVar = [("data", c_void_p), ("item_stride", c_int64), ("row_stride", c_int64)]


class Attention(Structure):
    """`trdq_attention`: one attention over all items and heads."""

    _fields_: ClassVar = [
        ("q", Heads),
        ("k", Heads),
        ("v", Heads),
        ("y", Heads),
        ("items", c_int64),
        ("heads", c_int64),
        ("rows", c_int64),
        ("keys", c_int64),
        ("width", c_int64),
        ("mask", c_void_p),
        ("mask_item", c_int64),
        ("mask_head", c_int64),
        ("mask_row", c_int64),
        ("factor", c_float),
        ("bits", c_int),
    ]
