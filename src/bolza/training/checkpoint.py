"""Trees of tensors and plain values in one safetensors file, written whole or not at all.

The definitions are in :mod:`bolza.core.tree_files`, where every family can reach them.
"""

from __future__ import annotations

from bolza.core.tree_files import check_writable, discard_partial, load_tree, save_tree

__all__ = ["check_writable", "discard_partial", "load_tree", "save_tree"]
